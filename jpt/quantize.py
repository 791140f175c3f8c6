"""python -m jpt.quantize --config=configs/quantize.py:MODEL,RECIPE --output=DIR: a smaller model, and what it cost.

The model goes through text once to see how large its layers' inputs are and how far off each of them would be, and
through held-out text for perplexity and divergence. The result is a jpt checkpoint or a Hugging Face directory
(config.to), with quantize.json and quantize.png beside the weights. With --config.stream=True a model larger than
memory goes from files to files, without text. See docs/quantize.md.
"""

import contextlib
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags
from rich.console import Console

import jpt
from jpt.checkpoint.directories import check_absent
from jpt.checkpoint.hf_export import write_hf
from jpt.checkpoint.hf_quantized import Described, check_held
from jpt.checkpoint.model_dir import write_model
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.source import LeafSource, assembled, leaves_of
from jpt.checkpoint.tree import name_of
from jpt.config import from_config_dict
from jpt.convert import bytes_written, peak_memory, progress, size_text
from jpt.data.batch import Batch
from jpt.evaluation.text import batches_from
from jpt.model import Model
from jpt.models.names import get, leaves, put
from jpt.quant.formats import Format
from jpt.quant.packing import Packing
from jpt.quant.recipes import KEEP, Recipe, chosen, left_out
from jpt.quantization import report
from jpt.quantization.auto import automatic, fitting
from jpt.quantization.by_layer import by_layer
from jpt.quantization.inputs import weights_of
from jpt.quantization.run import Quantized, formats_of, quantize_model
from jpt.quantization.settings import QuantizeConfig
from jpt.quantization.streaming import QuantizedSource
from jpt.sharding.mesh import batch_shardings, check_batch, make_mesh, use_mesh


def quantize(config: QuantizeConfig, output: str | Path, console: Console | None = None) -> Quantized:
    """Quantizes a model, writes it to a new directory and returns it with its report.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with what is wrong, and where.
    """
    console = console or Console(width=160)
    check_absent(output)
    mesh = None if config.mesh is None else make_mesh(config.mesh)
    with use_mesh(mesh):
        made = _measured(jpt.load(config.model, mesh=mesh, dtype=config.dtype), config, console)
    report.show(made, console)
    with _whole(output) as fresh:
        if config.to == 'hf':
            made.model.export(fresh, max_shard_size=config.max_shard_size)
        else:
            made.model.save(fresh)
        report.write(made, fresh)
    console.print(f'saved {output}, with {report.JSON_FILE} and {report.PLOT_FILE}')
    return made


def _measured(model: Model, config: QuantizeConfig, console: Console) -> Quantized:
    """The quantized model with its report, where the model lies."""
    if not model.config.causal:
        raise ValueError(
            f'config.model={config.model}: {model.config.family} is an encoder: expected one that predicts text'
        )
    auto = None
    if not config.auto.formats:
        model, recipe = _ready(model, config.choices(), config)
    elif config.to == 'hf':
        _check_candidates(model, config)
    calibration, held_out = (_placed(model.mesh, batches) for batches in batches_from(model, config.text))
    if config.auto.formats:
        auto = automatic(model, config.recipe, calibration, config.auto, config.calibration, console.print)
        model, recipe = _ready(model, auto.choices(), config)
    made = quantize_model(
        model, recipe, calibration, held_out, config.calibration, lambda line: console.print(line), config.kv_cache
    )
    return made._replace(auto=auto, text=config.text)


def _placed(mesh: Mesh | None, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with their rows over a mesh."""
    if mesh is None:
        return list(batches)
    rows, length = batches[0].tokens.shape
    check_batch(mesh, rows, length, 1)
    return [jax.device_put(batch, batch_shardings(mesh, batch)) for batch in batches]


def quantize_files(config: QuantizeConfig, output: str | Path, console: Console | None = None) -> report.Streamed:
    """Quantizes a model by its weights alone, from files to files with a piece of a weight in memory at a time.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with what is wrong, and where.
    """
    console = console or Console(width=160)
    start = time.perf_counter()
    check_absent(output)
    opened = open_model(config.model, config.dtype)
    shapes = _shapes(opened.source)
    formats = chosen(shapes, config.choices())
    source = QuantizedSource(opened.source, formats, search=config.calibration.weights == 'mse')
    if config.to == 'hf':
        _check_held(Described(source.cfg, source.quantized))
    before, after = (bytes_written(each, 'jpt') for each in (opened.source, source))
    total, done, show = bytes_written(source, config.to), 0, progress()

    def count(name: str, size: int) -> None:
        nonlocal done
        done += size
        show(name, done, total)

    with _whole(output) as fresh:
        if config.to == 'hf':
            size = config.max_shard_size
            write_hf(source, fresh, source_dir=opened.assets, origin=opened.origin, max_shard_size=size, report=count)
        else:
            write_model(source, fresh, assets=opened.assets, origin=opened.origin, report=count)
        made = report.Streamed(source.reports(), (before, after), left_out(shapes, formats), config.calibration)
        report.write_streamed(made, fresh)
    report.show_streamed(made, console)
    seconds, weights = time.perf_counter() - start, sum(math.prod(leaf.shape) for leaf in leaves(source.cfg))
    console.print(f'{seconds:.1f} s, {weights / seconds / 1e6:.0f} M weights/s, peak memory {size_text(peak_memory())}')
    console.print(f'saved {output}, with {report.JSON_FILE}')
    return made


def _shapes(source: LeafSource) -> dict[str, Any]:
    """The parameter tree without its values."""
    tree: dict[str, Any] = {}
    for leaf in leaves_of(source):
        put(tree, leaf.path, jax.ShapeDtypeStruct(leaf.shape, source.dtype(leaf)))
    return assembled(source, tree)


@contextlib.contextmanager
def _whole(output: str | Path) -> Iterator[Path]:
    """A directory to make, which gets its name when all is in it: weights appear with their report or not at all."""
    fresh = Path(output).with_name(f'{Path(output).name}.new')
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    yield fresh
    fresh.replace(output)


def _ready(model: Model, recipe: Recipe, config: QuantizeConfig) -> tuple[Model, Recipe]:
    """The model in segments of layers that have the same formats, and the recipe for these."""
    model, recipe = by_layer(model, recipe)
    if config.to == 'hf':
        _check_export(model, formats_of(model, recipe, config.kv_cache), config)
    return model, recipe


def _check_candidates(model: Model, config: QuantizeConfig) -> None:
    """Raises ValueError where no Hugging Face directory could hold a mix of the formats that may be chosen."""
    weights = weights_of(model.params, chosen(model.params, config.choices()))
    fits = [fitting(weights, name) for name in config.auto.formats if name != KEEP]
    for turn in range(len(fits)):  # every weight in every format, beside the others
        mixed = {}
        for at, path in enumerate(weights):
            options = [own[path] for own in fits if path in own]
            if options:
                mixed[path] = options[(at + turn) % len(options)]
        _check_export(model, mixed, config)


def _check_export(model: Model, formats: Mapping[str, Format], config: QuantizeConfig) -> None:
    """Raises ValueError where no Hugging Face directory could hold what is asked for, before layers are compared."""
    moved = config.calibration.factors
    packings = {}
    for leaf in leaves(model.config):
        form = formats.get(name_of(leaf.path))
        if form is not None:
            factor = moved == 'awq' or (moved == 'smoothquant' and form.inputs != 'as_they_are')
            packings[leaf.path] = Packing(form, str(get(model.params, leaf.path).dtype), form.takes_input_scale, factor)
    cfg = model.config if config.kv_cache == 'as_it_is' else dataclasses.replace(model.config, kv_cache='fp8')
    _check_held(Described(cfg, packings))


def _check_held(model: Described) -> None:
    try:
        check_held(model)
    except ValueError as error:
        raise ValueError(f"config.to='hf': expected 'jpt', or other formats:\n{error}") from error


def main(argv: list[str], holder: Any) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)  # Orbax tells its every step
    try:
        config = from_config_dict(QuantizeConfig, holder.value, 'config')
        (quantize_files if config.stream else quantize)(config, flags.FLAGS.output)
    except (OSError, ValueError) as error:
        sys.exit(f'jpt.quantize: {error}')


if __name__ == '__main__':
    flags.DEFINE_string('output', None, 'The directory to make.', required=True)
    config_holder = config_flags.DEFINE_config_file('config', None, 'A file of configs/, with a function get_config().')
    flags.mark_flag_as_required('config')
    app.run(lambda argv: main(argv, config_holder))
