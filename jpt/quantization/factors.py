"""Factors of inputs, [R, in] or [R, E, in]: SmoothQuant's from what was measured, AWQ's by trying them on the inputs.

Weights that read the same input (inputs.py) are always taken together and get one and the same array.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch
from jpt.model import Model
from jpt.models.calibration import Calibration, calibrate
from jpt.quant.formats import Format
from jpt.quant.input_factors import EXPONENTS, awq_factor, joint_amax, joint_share, smoothquant_factor
from jpt.quant.statistics import LARGEST
from jpt.quant.tensors import QTensor, quantize
from jpt.quantization.inputs import (
    groups_of,
    input_limits,
    input_of,
    input_scale,
    mean_of,
    node_of,
    tree_of,
    weights_of,
)

Factors = dict[str, np.ndarray]


def smoothquant_factors(params: Any, formats: Mapping[str, Format], statistics: Calibration, alpha: float) -> Factors:
    """The factors of all weights whose inputs are rounded, from the largest inputs and weights of every channel.

    Raises:
        ValueError: no inputs are rounded, so there is nothing to smooth.
    """
    weights = weights_of(params, formats)
    found: Factors = {}
    for members in groups_of(formats).values():
        read = input_of(members[0], statistics)
        if read is None or all(formats[path].inputs == 'as_they_are' for path in members):
            continue
        factor = smoothquant_factor(read[LARGEST], joint_amax([weights[path] for path in members]), alpha)
        found |= dict.fromkeys(members, factor)
    if not found:
        raise ValueError(
            "calibration.factors='smoothquant': expected a format that rounds the inputs of layers, or factors='awq'"
        )
    return found


def awq_factors(
    model: Model,
    formats: Mapping[str, Format],
    statistics: Calibration,
    batches: Sequence[Batch],
    say: Callable[[str], Any] = lambda line: None,
) -> Factors:
    """The factors, of AWQ's grid and of none at all, with the least error of the output on the batches, layer by layer.

    Each of the grid is a pass over the batches in which every layer is given what it reads in the model as it is, and
    its output with the quantized weight is compared. So the error is that of all tokens, of any width, inputs rounded
    where the format says so, and nothing is kept of them: the products of all pairs of channels, from which the error
    of weights could be had in one pass, take as much memory as several weights. The errors of weights that read the
    same input are added.
    """
    weights = weights_of(model.params, formats)
    groups = {name: members for name, members in groups_of(formats).items() if input_of(members[0], statistics)}
    shares = {
        name: joint_share([weights[path] for path in members], [formats[path] for path in members])
        for name, members in groups.items()
    }
    best: Factors = {}
    least: dict[str, np.ndarray] = {}
    for exponent in (None, *EXPONENTS):
        say(f'factors of inputs: trying {"none" if exponent is None else f"exponent {exponent}"}')
        tried: Factors = {}
        for name, members in groups.items():
            mean = mean_of(members[0], statistics, 'absolute')
            factor = np.ones(mean.shape, np.float32) if exponent is None else awq_factor(mean, shares[name], exponent)
            tried |= dict.fromkeys(members, factor)
        compared = _compared(model, formats, statistics, batches, tried, weights)
        for name, members in groups.items():
            noise = np.sum([_noise(path, compared) for path in members], axis=0)
            better = noise < least.get(name, np.inf)
            least[name] = np.where(better, noise, least.get(name, noise))
            factor = np.where(better[..., None], tried[members[0]], best.get(members[0], tried[members[0]]))
            best |= dict.fromkeys(members, factor)
    return best


def _noise(path: str, compared: Calibration) -> np.ndarray:
    """How far a weight's output is off, [R] or [R, E]."""
    node = node_of(path, compared)
    assert node is not None
    return node['output']['noise']


def _compared(
    model: Model,
    formats: Mapping[str, Format],
    statistics: Calibration,
    batches: Sequence[Batch],
    factors: Factors,
    weights: Mapping[str, jax.Array],
) -> Calibration:
    """Every layer's output with its weight quantized with these factors, beside its own."""
    limits = input_limits(formats, statistics, factors)
    kernels = {}
    for path, factor in factors.items():
        scale = input_scale(limits[path], formats[path]) if path in limits else None
        kernels[path] = _quantized(weights[path], formats[path], factor, scale)
    tree = tree_of(model.config, kernels)
    return calibrate(model.config, model.params, batches, (), model.compute, compared=tree)


@jax.jit(static_argnums=1)
def _quantized(weight: jax.Array, form: Format, factor: jax.Array, scale: jax.Array | None) -> QTensor:
    return quantize(weight, form, input_factor=jnp.asarray(factor), input_scale=scale)
