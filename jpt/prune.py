"""python -m jpt.prune --input=DIR --output=DIR --data=FILE --intermediate_size=N ...: a smaller student from a model.

Text goes through the model once; what its layers pass on says which layers, MLP channels, heads and hidden dimensions
matter (jpt/pruning/importance.py). The rest is left out, and the loss is told after each step.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from jpt.checkpoint.directories import check_absent, new_directory
from jpt.checkpoint.hf_export import write_hf
from jpt.checkpoint.selected import SelectedLayers
from jpt.checkpoint.shards import parse_size
from jpt.checkpoint.source import LeafSource, TreeSource, load_tree
from jpt.config import ConfigError
from jpt.convert import parse_layers
from jpt.data.batch import Batch
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from, mean_loss
from jpt.model import Model, load
from jpt.models.calibration import calibrate
from jpt.models.config import ModelConfig
from jpt.models.names import leaves
from jpt.pruning.importance import importance
from jpt.pruning.target import Target, check_target, steps

REPORT = 'prune.json'
CRITERIA = ('similarity', 'loss')
Say = Callable[[str], Any]


def prune(
    input_dir: str | Path,
    output_dir: str | Path,
    target: Target,
    text: TextConfig,
    *,
    layer_importance: str = 'similarity',
    max_shard_size: str | int = '5GB',
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes a smaller model as a Hugging Face directory and returns what stands in its prune.json.

    Args:
        input_dir: a Hugging Face directory, a jpt checkpoint, or 'quickstart'; it is held in memory.
        output_dir: does not exist, or is empty.
        target: the sizes that are asked for.
        text: what calibrates and measures.
        layer_importance: 'similarity': layers whose output is most like their input go; 'loss': those without which the
            loss is lowest, each left out alone.
        say: gets a line of progress at a time.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with what is wrong, and where.
    """
    _check_criterion(layer_importance, target)
    parse_size(max_shard_size)
    check_absent(output_dir)
    model = load(input_dir, mtp=False)
    if not model.config.causal:
        raise ValueError(f'--input={input_dir}: {model.config.family} is an encoder: expected one that predicts text')
    check_target(model.config, target)
    calibration, held_out = batches_from(model, text)
    whole = TreeSource(model.config, model.params)
    say(f'calibrating on {_tokens(calibration):,} tokens of {", ".join(text.calibration.paths)}')
    scores = importance(model.config, calibrate(model.config, model.params, calibration, compute=model.compute))
    if layer_importance == 'loss':
        scores = dataclasses.replace(scores, layers_L=losses_without(whole, calibration, say))
    plan = list(steps(whole, scores, target))
    losses = [_told('the whole model', whole.cfg, mean_loss(model, held_out), say)]
    for step in plan:
        losses.append(_told(f'fewer {step.name}', step.source.cfg, mean_loss(in_memory(step.source), held_out), say))
    report = {
        'input': str(input_dir),
        'target': {name: size for name, size in dataclasses.asdict(target).items() if size is not None},
        'text': dataclasses.asdict(text) | {'length': calibration[0].tokens.shape[1]},
        'calibration_tokens': _tokens(calibration),
        'layer_importance': layer_importance,
        'layer_scores': scores.layers_L.tolist(),
        'losses': losses,
        'kept': {'layers': plan[-1].layers} | dataclasses.asdict(plan[-1].kept),
    }
    with new_directory(output_dir) as directory:
        made, card = plan[-1].source, model.origin
        write_hf(made, directory, source_dir=model.assets, origin=card, max_shard_size=max_shard_size)
        (directory / REPORT).write_text(json.dumps(report) + '\n', 'utf-8')
    return report


def _check_criterion(layer_importance: str, target: Target) -> None:
    if layer_importance not in CRITERIA:
        raise ValueError(f'--layer_importance={layer_importance}: expected {" or ".join(CRITERIA)}')
    if layer_importance != CRITERIA[0] and target.num_hidden_layers is None:
        raise ValueError(
            f'--layer_importance={layer_importance}: it says which of the layers stay: expected --num_hidden_layers'
        )


def in_memory(source: LeafSource) -> Model:
    """The model of a source, without tokenizer."""
    return Model(source.cfg, load_tree(source))


def losses_without(source: LeafSource, batches: Sequence[Batch], say: Say) -> np.ndarray:
    """[L] the loss of a model when each of its layers is left out alone (Minitron, section 2.2)."""
    count, losses = source.cfg.num_layers, []
    for layer in range(count):
        rest = SelectedLayers(source, [other for other in range(count) if other != layer])
        losses.append(mean_loss(in_memory(rest), batches))
        say(f'loss {losses[-1]:.4f} without layer {layer}')
    return np.array(losses)


def _told(name: str, cfg: ModelConfig, loss: float, say: Say) -> dict[str, Any]:
    """A row of the report."""
    parameters = sum(math.prod(leaf.shape) for leaf in leaves(cfg))
    say(f'loss {loss:.4f}  {parameters:>15,} parameters  {name}')
    return {'model': name, 'loss': loss, 'parameters': parameters}


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int((batch.segment_ids > 0).sum()) for batch in batches)


def _define_flags() -> None:
    flags.DEFINE_string('input', None, "A Hugging Face directory, a jpt checkpoint, or 'quickstart'.")
    flags.DEFINE_string('output', None, 'The Hugging Face directory to make.')
    flags.DEFINE_string('data', None, 'Text to calibrate on: a file, a pattern, or stdlib:train.')
    flags.DEFINE_string('held_out', None, 'Text to measure the loss on; by default that of --data.')
    flags.DEFINE_integer('num_hidden_layers', None, 'How many layers stay: those that matter most.')
    flags.DEFINE_string('layers', None, 'Which layers stay, such as 0-3,6.')
    flags.DEFINE_enum('layer_importance', 'similarity', CRITERIA, 'What says that a layer matters.')
    flags.DEFINE_integer('intermediate_size', None, 'MLP channels of each layer.')
    flags.DEFINE_integer('num_attention_heads', None, 'Query heads.')
    flags.DEFINE_integer('num_key_value_heads', None, 'Key and value heads.')
    flags.DEFINE_integer('hidden_size', None, 'Hidden dimensions.')
    flags.DEFINE_integer('rows', 128, 'Rows of tokens from each of the texts.')
    flags.DEFINE_integer('length', 0, "Tokens of a row; 0: the model's own length, 1024 at most.")
    flags.DEFINE_integer('batch_size', 8, 'Rows at a time.')
    flags.DEFINE_integer('seed', 0, 'The order in which texts are read.')
    flags.DEFINE_string('max_shard_size', '5GB', 'Largest safetensors file, such as 5GB or 512MiB.')
    flags.mark_flags_as_required(['input', 'output', 'data'])


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments {argv[1:]}')
    logging.set_verbosity(logging.WARNING)  # Orbax tells its every step
    args = flags.FLAGS
    try:
        layers = None if args.layers is None else parse_layers(args.layers)
        sizes = {name: getattr(args, name) for name in _names(Target) if name != 'layers'}
        prune(
            args.input,
            args.output,
            Target(layers=layers, **sizes),
            _text_of(args),
            layer_importance=args.layer_importance,
            max_shard_size=args.max_shard_size,
            say=lambda line: print(line, flush=True),
        )
    except (OSError, ValueError) as error:
        print(f'error: {_named(error)}', file=sys.stderr)
        sys.exit(1)
    print(f'saved {args.output}: a Hugging Face directory, and {REPORT}, which says what was kept')


def _text_of(args: Any) -> TextConfig:
    settings = {name: getattr(args, name) for name in ('rows', 'length', 'batch_size', 'seed')}
    return TextConfig.of_files(args.data, args.held_out or args.data, **settings)


def _named(error: Exception) -> str:
    """The message of an error, with the flag where it is one of a setting."""
    return f'--{error.field}={error.value}: expected {error.expected}' if isinstance(error, ConfigError) else f'{error}'


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


if __name__ == '__main__':
    _define_flags()
    app.run(main)
