"""Which weights a run trains through their rounding, by a recipe or as in a calibrated model, and what it ends with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jpt.checkpoint.hf_quantized import Described, check_held
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.source import leaves_of
from jpt.checkpoint.tree import name_of
from jpt.models.config import ModelConfig
from jpt.models.names import TreePath, leaves
from jpt.quant.formats import Format
from jpt.quant.packing import Packing
from jpt.quant.recipes import chosen, in_training
from jpt.quant.tensors import STATIC
from jpt.training.settings import FakeQuantConfig, TrainConfig


class Rounding(NamedTuple):
    """Formats of weights by path, and the scales of each that stay as calibration found them, by FakeQuant's names."""

    formats: Mapping[str, Format]
    static: Mapping[str, Mapping[str, np.ndarray]]


def calibrated_rounding(path: str, cfg: ModelConfig, clipped: bool = False) -> Rounding:
    """The formats and fixed scales of a quantized model, for a model of this config.

    Raises:
        FileNotFoundError: no model there.
        ValueError: its weights are not quantized, or have factors of inputs, or it is another model than the config's,
            or it has no fixed scale that something could be `clipped` by.
    """
    source, place = open_model(path, mtp=False).source, f'config.quantize.calibrated={path}'
    if not source.quantized:
        raise ValueError(f'{place}: its weights are not quantized: expected what python -m jpt.quantize writes')
    if source.cfg.kv_cache != cfg.kv_cache:
        raise ValueError(
            f'{place}: has kv_cache={source.cfg.kv_cache!r}, and config.model {cfg.kv_cache!r}: expected the same; '
            'configs/quantize.py:MODEL,fp8_kv rounds the keys and values of config.model alone'
        )
    shapes = {leaf.path: leaf.shape for leaf in leaves(cfg)}
    for leaf in leaves(source.cfg):
        if leaf.path in source.quantized and shapes.get(leaf.path) != leaf.shape:
            has = shapes.get(leaf.path, 'no such weight; layers apart in their formats are not trained')
            raise ValueError(f'{place}: {name_of(leaf.path)} is {leaf.shape}; config.model has {has}')
    factors = [name_of(where) for where, packing in source.quantized.items() if packing.input_factor]
    if factors:
        raise ValueError(
            f'{place}: {factors[0]} has an input_factor, with which nothing is trained: expected a recipe without '
            'SmoothQuant and AWQ'
        )
    found: dict[str, dict[str, np.ndarray]] = {}
    for leaf in leaves_of(source):
        if leaf.part in STATIC:
            values = source.read(leaf, tuple(slice(0, size) for size in leaf.shape))
            found.setdefault(name_of(leaf.path[:-1]), {})[leaf.part] = values
    if clipped and not found:
        raise ValueError(
            f'{place}: it has no static scale, so config.quantize.clipped=True would change nothing: expected False'
        )
    return Rounding({name_of(where): packing.form for where, packing in source.quantized.items()}, found)


def rounded_model(config: TrainConfig, cfg: ModelConfig, model: Any, calibrated: Rounding | None) -> Any:
    """The model with the weights that config.quantize names trained through their rounding.

    Raises:
        ValueError: a recipe that does not fit, or weights at the end that cannot be exported where they should be.
    """
    given = config.quantize
    assert given is not None
    rounding = calibrated or Rounding(chosen(model, given.choices(), 'config.quantize.recipe'), {})
    if config.checkpoint.export and given.result == 'quantized':
        paths: dict[TreePath, str] = {leaf.path: name_of(leaf.path) for leaf in leaves(cfg)}
        check_export(
            f'config.quantize.{_said(given)}',
            cfg,
            {
                path: Packing(rounding.formats[name], 'float32', 'input_scale' in rounding.static.get(name, {}))
                for path, name in paths.items()
                if name in rounding.formats
            },
        )
    return in_training(model, rounding.formats, given.gradients, rounding.static, given.clipped)


def _said(config: FakeQuantConfig) -> str:
    """The setting that names formats, and its value."""
    return f'recipe={config.recipe}' if config.calibrated is None else f'calibrated={config.calibrated}'


def check_export(place: str, cfg: ModelConfig, quantized: Mapping[TreePath, Packing]) -> None:
    """Raises ValueError where no Hugging Face directory holds a model with these weights."""
    try:
        check_held(Described(cfg, quantized))
    except ValueError as error:
        raise ValueError(
            f'{place}: what the run ends with cannot be exported; expected other formats (such as nvfp4_weights), or '
            f'config.checkpoint.export=False; python -m jpt.quantize of the run calibrates inputs:\n{error}'
        ) from error
