"""Calibration in order: what is measured, factors of inputs, scales of inputs, scales of weights; then the weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch
from jpt.kernels.low_precision import exact_divide
from jpt.model import Model
from jpt.models.calibration import Calibration, calibrate
from jpt.quant.amax_search import searched_amax
from jpt.quant.formats import Format
from jpt.quant.recipes import quantized_tree
from jpt.quant.statistics import HISTOGRAM, LARGEST
from jpt.quant.tensors import QTensor, block_amax, quantize, scales_of
from jpt.quantization.factors import Factors, awq_factors, smoothquant_factors
from jpt.quantization.inputs import (
    check_inputs,
    input_limits,
    input_of,
    input_scale,
    mean_of,
    real_tokens,
    second_groups,
    tree_of,
    weights_of,
)
from jpt.quantization.settings import CalibrationConfig


def calibrated_params(
    model: Model,
    formats: Mapping[str, Format],
    batches: Sequence[Batch],
    how: CalibrationConfig,
    say: Callable[[str], Any] = lambda line: None,
) -> Any:
    """The parameters with every weight that has a format quantized, scales and factors by what the batches show.

    Raises:
        ValueError: inputs that are not finite, or factors that the formats have no use for.
    """
    statistics = _measured(model, formats, batches, how, say)
    factors: Factors = {}
    if how.factors == 'smoothquant' and statistics is not None:
        factors = smoothquant_factors(model.params, formats, statistics, how.alpha)
    elif how.factors == 'awq' and statistics is not None:
        factors = awq_factors(model, formats, statistics, batches, say)
    percent = None if how.inputs == 'max' else how.percentile
    seen = statistics
    if factors and HISTOGRAM in _statistics(formats, how):
        say('measuring the inputs multiplied by their factors')
        tree = tree_of(model.config, factors, 'input_factor')
        seen = calibrate(model.config, model.params, batches, (HISTOGRAM,), model.compute, factors=tree)
    limits = input_limits(formats, seen, factors, percent)
    return quantized_params(model.params, formats, statistics, how, factors, limits)


def _measured(
    model: Model,
    formats: Mapping[str, Format],
    batches: Sequence[Batch],
    how: CalibrationConfig,
    say: Callable[[str], Any],
) -> Calibration | None:
    """The statistics of all inputs, as far as they are needed; None where they are not."""
    needed = _statistics(formats, how)
    if not needed:
        return None
    say(f'calibrating on {real_tokens(batches):,} tokens')
    statistics = calibrate(model.config, model.params, batches, needed, model.compute)
    check_inputs(formats, statistics)
    return statistics


def _statistics(formats: Mapping[str, Format], how: CalibrationConfig) -> tuple[str, ...]:
    """What of the inputs has to be known."""
    static = any(form.takes_input_scale for form in formats.values())
    needed = {
        LARGEST: how.factors == 'smoothquant' or static,
        HISTOGRAM: how.inputs == 'percentile' and static,
        'absolute': how.factors == 'awq',
        'square': how.weights == 'weighted_mse',
    }
    return tuple(name for name, wanted in needed.items() if wanted)


def quantized_params(
    params: Any,
    formats: Mapping[str, Format],
    statistics: Calibration | None,
    how: CalibrationConfig,
    factors: Mapping[str, np.ndarray],
    limits: Mapping[str, np.ndarray],
) -> Any:
    """The tree with every weight that has a format quantized.

    Args:
        statistics: 'square' of inputs, where how.weights is 'weighted_mse'.
        factors: [R, in] or [R, E, in] of inputs, by path.
        limits: [R] or [R, E] that inputs are rounded within, by path, where they have one scale.
    """

    shared = _second_scales(params, formats, factors)

    def kernel(path: str, weight: jax.Array, form: Format) -> QTensor:
        factor, squares = factors.get(path), None
        scale = input_scale(limits[path], form) if path in limits else None
        if how.weights == 'weighted_mse' and statistics is not None and input_of(path, statistics):
            squares = mean_of(path, statistics, 'square') * np.square(1.0 if factor is None else factor)
            squares = squares.astype(np.float32)
        return _quantize(weight, form, how.weights != 'max', factor, scale, squares, shared.get(path))

    return quantized_tree(params, formats, kernel)


def _second_scales(
    params: Any, formats: Mapping[str, Format], factors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The second scales, [R, 1, 1] or [R, E, 1, 1], where there are any: of weights that share one the largest."""
    weights = weights_of(params, formats)
    found: dict[str, np.ndarray] = {}
    for group in second_groups(formats):
        own = [np.asarray(_second_scale(weights[path], formats[path], factors.get(path))) for path in group]
        found |= dict.fromkeys(group, np.max(own, axis=0))
    return found


@jax.jit(static_argnums=1)
def _second_scale(weight: jax.Array, form: Format, factor: jax.Array | None) -> jax.Array | None:
    wide = weight.astype(jnp.float32)
    if factor is not None:
        wide = exact_divide(wide, factor[..., None, :])
    return scales_of(block_amax(wide, form), form)[1]


@jax.jit(static_argnums=(1, 2))
def _quantize(
    weight: jax.Array,
    form: Format,
    search: bool,
    factor: jax.Array | None,
    scale: jax.Array | None,
    squares: jax.Array | None,
    second: jax.Array | None,
) -> QTensor:
    amax = None
    if search:
        amax, second = searched_amax(weight, form, squares, factor=factor, scale_2=second)
    return quantize(weight, form, amax=amax, scale_2=second, input_scale=scale, input_factor=factor)
