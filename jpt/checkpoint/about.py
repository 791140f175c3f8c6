"""What a checkpoint says of itself: which model, which leaves, which tokenizer, written by which version.

Layout of a jpt checkpoint, the same for a step of a training run and for a model on its own:

    model/model.json        this description
    state/                  the tree, by Orbax: params/..., and for a training step opt_state/..., step, key, ...
    assets/                 tokenizer files, generation_config.json, config.json of the source
    config/config.json      the run's configuration (training)
    data/data.json          the state of the data iterator, and of whatever else goes on where it stopped (training)
    manifest/manifest.json  checksums of all of the above
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jpt
from jpt.checkpoint.manifest import MANIFEST_FILE, CheckpointMismatch
from jpt.checkpoint.tree import LeafSpec
from jpt.models.config import ModelConfig

FORMAT = 1
STATE, MODEL, ASSETS, CONFIG, DATA, MANIFEST = 'state', 'model', 'assets', 'config', 'data', 'manifest'
MODEL_FILE, CONFIG_FILE, DATA_FILE = 'model.json', 'config.json', 'data.json'


class About(NamedTuple):
    """The description of a checkpoint; `model` is None where a run trains something that is no ModelConfig."""

    kind: Literal['model', 'training']
    leaves: dict[str, LeafSpec]
    model: ModelConfig | None
    tokenizer: str | None  # the tokenizer's fingerprint
    statics: dict[str, Any] = {}  # noqa: RUF012 (never changed): static fields of weight types, see tree.statics_of
    version: str = jpt.__version__


def to_json(about: About) -> dict[str, Any]:
    """The JSON form of a description."""
    return {
        'format': FORMAT,
        'jpt': about.version,
        'kind': about.kind,
        'model': None if about.model is None else model_to_json(about.model),
        'tokenizer': about.tokenizer,
        'leaves': {name: [spec.dtype, list(spec.shape)] for name, spec in about.leaves.items()},
        'statics': about.statics,
    }


def read_about(directory: Path) -> About:
    """The description of the checkpoint in `directory`.

    Raises:
        FileNotFoundError: it is no jpt checkpoint.
        CheckpointMismatch: written in an older format, without a field that this version needs.
        ValueError: damaged, or of a format that this version does not read.
    """
    path = directory / MODEL / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f'{directory} is not a jpt checkpoint: it has no {MODEL}/{MODEL_FILE}')
    try:
        content = json.loads(path.read_text('utf-8'))
        if content['format'] != FORMAT:
            raise ValueError(f'format {content["format"]} (written by jpt {content.get("jpt")}): expected {FORMAT}')
        leaves = {name: LeafSpec(dtype, tuple(shape)) for name, (dtype, shape) in content['leaves'].items()}
        model = None if content['model'] is None else model_from_json(content['model'])
        return About(content['kind'], leaves, model, content['tokenizer'], content['statics'], content['jpt'])
    except KeyError as error:
        raise CheckpointMismatch(f'{path}: no field {error}: written in an older format than jpt reads') from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: cannot be read as the description of a checkpoint: {error}') from error


def model_to_json(cfg: ModelConfig) -> dict[str, Any]:
    """Every field of a ModelConfig."""
    return dataclasses.asdict(cfg)


def model_from_json(content: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that `model_to_json` wrote.

    Raises:
        ValueError: a field that this version does not know: it may change the computation.
    """
    return _build(ModelConfig, content)


def _build(cls: Any, fields: Mapping[str, Any]) -> Any:
    """A frozen dataclass from its fields as JSON has them."""
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f'{cls.__name__} has fields that this version of jpt does not know: {", ".join(unknown)}')
    types = get_type_hints(cls)
    return cls(**{name: _value(types[name], value) for name, value in fields.items()})


def _value(declared: Any, content: Any) -> Any:
    """What JSON holds as an object is the dataclass among the declared types, and a list is a tuple."""
    if isinstance(content, list):
        return tuple(_value(get_args(declared)[0], part) for part in content)
    if isinstance(content, Mapping):
        cls = next(kind for kind in (declared, *get_args(declared)) if dataclasses.is_dataclass(kind))
        return _build(cls, content)
    return content


def model_differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    """One line per field in which two model configs differ."""
    pairs = (
        (field.name, getattr(stored, field.name), getattr(wanted, field.name)) for field in dataclasses.fields(stored)
    )
    return [f'model.{name}: {old!r} in the checkpoint, expected {new!r}' for name, old, new in pairs if old != new]


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a finished jpt checkpoint: a model, or one step of a training run."""
    return (directory / MODEL / MODEL_FILE).is_file() and (directory / MANIFEST / MANIFEST_FILE).is_file()
