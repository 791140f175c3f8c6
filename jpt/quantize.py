"""python -m jpt.quantize --config=configs/quantize.py:MODEL,RECIPE --output=DIR: a smaller model, and what it cost.

The model goes through text once to see how large its layers' inputs are and how far off each of them would be, and
through held-out text for perplexity and divergence. The result is a jpt checkpoint or a Hugging Face directory
(config.to), with quantize.json and quantize.png beside the weights. See docs/quantize.md.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

import jpt
from jpt.checkpoint.directories import check_absent
from jpt.checkpoint.hf_quantized import Described, check_held
from jpt.checkpoint.tree import name_of
from jpt.config import from_config_dict
from jpt.evaluation.text import Text, batches_from
from jpt.model import Model
from jpt.models.names import get, leaves
from jpt.quant.packing import Packing
from jpt.quant.recipes import Recipe, chosen
from jpt.quantization import report
from jpt.quantization.auto import automatic
from jpt.quantization.by_layer import by_layer
from jpt.quantization.run import Quantized, quantize_model
from jpt.quantization.settings import QuantizeConfig


def quantize(config: QuantizeConfig, output: str | Path, console: Console | None = None) -> Quantized:
    """Quantizes a model, writes it to a new directory and returns it with its report.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with what is wrong, and where.
    """
    console = console or Console(width=160)
    check_absent(output)
    model = jpt.load(config.model, dtype=config.dtype)
    if not model.config.causal:
        raise ValueError(
            f'config.model={config.model}: {model.config.family} is an encoder: expected one that predicts text'
        )
    auto = None
    if not config.auto.formats:
        model, recipe = _ready(model, config.choices(), config)
    text = config.text
    windows = Text(text.calibration, text.held_out, text.rows, text.length, text.batch_size, text.seed)
    calibration, held_out = batches_from(model, windows)
    if config.auto.formats:
        auto = automatic(model, config.recipe, calibration, config.auto, config.calibration, console.print)
        model, recipe = _ready(model, auto.choices(), config)
    made = quantize_model(
        model, recipe, calibration, held_out, config.calibration, lambda line: console.print(line)
    )._replace(auto=auto)
    report.show(made, console)
    save = made.model.export if config.to == 'hf' else made.model.save
    fresh = Path(output).with_name(f'{Path(output).name}.new')  # the directory appears with its report, or not at all
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    save(fresh)
    report.write(made, fresh)
    fresh.replace(output)
    console.print(f'saved {output}, with {report.JSON_FILE} and {report.PLOT_FILE}')
    return made


def _ready(model: Model, recipe: Recipe, config: QuantizeConfig) -> tuple[Model, Recipe]:
    """The model in segments of layers that have the same formats, and the recipe for these."""
    model, recipe = by_layer(model, recipe)
    if config.to == 'hf':
        _check_export(model, recipe, config)
    return model, recipe


def _check_export(model: Model, recipe: Recipe, config: QuantizeConfig) -> None:
    """Raises ValueError where no Hugging Face directory could hold what is asked for, before layers are compared."""
    formats, moved = chosen(model.params, recipe), config.calibration.factors
    packings = {}
    for leaf in leaves(model.config):
        form = formats.get(name_of(leaf.path))
        if form is not None:
            factor = moved == 'awq' or (moved == 'smoothquant' and form.inputs != 'as_they_are')
            packings[leaf.path] = Packing(form, str(get(model.params, leaf.path).dtype), form.takes_input_scale, factor)
    try:
        check_held(Described(model.config, packings))
    except ValueError as error:
        raise ValueError(f"config.to='hf': expected 'jpt', or other formats:\n{error}") from error


def main(argv: list[str], holder: Any) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)  # Orbax tells its every step
    try:
        quantize(from_config_dict(QuantizeConfig, holder.value, 'config'), flags.FLAGS.output)
    except (OSError, ValueError) as error:
        sys.exit(f'jpt.quantize: {error}')


if __name__ == '__main__':
    flags.DEFINE_string('output', None, 'The directory to make.', required=True)
    config_holder = config_flags.DEFINE_config_file('config', None, 'A file of configs/, with a function get_config().')
    flags.mark_flag_as_required('config')
    app.run(lambda argv: main(argv, config_holder))
