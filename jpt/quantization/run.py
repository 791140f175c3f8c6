"""Quantizing a model: what its layers read, scales by that, and what it costs, layer by layer and in all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch
from jpt.data.config import TextConfig
from jpt.evaluation.score import Reference, score
from jpt.model import Model
from jpt.models.calibration import Calibration, calibrate
from jpt.models.config import ModelConfig
from jpt.quant.formats import Format
from jpt.quant.paths import paths
from jpt.quant.recipes import Recipe, chosen, left_out
from jpt.quant.statistics import CACHE
from jpt.quant.tensors import BEYOND, QTensor, number_of, numbers_of, spread
from jpt.quantization.auto import Automatic
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.checks import check_cache, check_measurable
from jpt.quantization.inputs import node_of, place_of, real_tokens, unseen_experts
from jpt.quantization.kv_cache import CacheReport, with_cache
from jpt.quantization.settings import CalibrationConfig, KVCache

Say = Callable[[str], Any]


class LayerReport(NamedTuple):
    """One weight of one layer, of experts all of them together."""

    layer: int  # number in the network
    path: str
    format: Format
    amax: float  # largest absolute value
    error: float  # norm of the weight's difference over the weight's norm
    clipped: float  # share of elements beyond the largest number of their block
    snr: float | None  # decibels of the layer's output over its error, inputs rounded too; None: not measured


class ModelReport(NamedTuple):
    """The model on held-out text, and its size."""

    name: str
    bytes: int
    loss: float  # nats per token
    kl: float  # KL(original || this), nats per token
    agreement: float  # share of tokens where both have the same likeliest word

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


class Quantized(NamedTuple):
    """A quantized model and what is to be known of it."""

    model: Model
    layers: list[LayerReport]
    models: tuple[ModelReport, ModelReport]  # the original, this one
    kept: list[str]  # matrices that were not quantized
    tokens: int  # of calibration
    how: CalibrationConfig
    unseen: dict[int, list[int]]  # experts, by the number of their layer, that no token of calibration went to
    cache: CacheReport | None = None  # of keys and values, where they were quantized
    auto: Automatic | None = None  # what chose the recipe
    text: TextConfig | None = None  # what was read, where a config said so


def quantize_model(
    model: Model,
    recipe: Recipe,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    how: CalibrationConfig = CalibrationConfig(),  # noqa: B008 (frozen)
    say: Say = lambda line: None,
    kv_cache: KVCache = 'as_it_is',
) -> Quantized:
    """Quantizes a model by a recipe and measures it.

    Args:
        model: with weights as they are.
        recipe: see jpt.quant.recipes.
        calibration: batches [B, T] that say how large inputs are, and on which layers are compared.
        held_out: batches for loss and divergence.
        how: scales are chosen.
        say: gets a line of progress at a time.
        kv_cache: of the model that is made.

    Raises:
        ValueError: a recipe that does not fit the model, or percentiles of the inputs of experts.
    """
    formats = formats_of(model, recipe, kv_cache)
    check_measurable(model, formats, how)
    check_cache(model.config, kv_cache, how, alone=not formats)
    if how.factors == 'smoothquant' and all(form.inputs == 'as_they_are' for form in formats.values()):
        raise ValueError("calibration.factors='smoothquant': no format of the recipe rounds inputs: expected 'awq'")
    cfg, compute = model.config, model.compute
    params = calibrated_params(model, formats, calibration, how, say) if formats else model.params
    say(f'quantized {len(formats)} of {len(formats) + len(left_out(model.params, formats))} matrices; comparing layers')
    watched = () if kv_cache == 'as_it_is' else (CACHE,)
    compared = calibrate(cfg, model.params, calibration, watched, compute, compared=params if formats else None)
    made, cache = dataclasses.replace(model, params=params), None
    if kv_cache != 'as_it_is':
        made, cache = with_cache(made, kv_cache, compared)
    say(f'measuring on {int(sum(batch.loss_mask.sum() for batch in held_out)):,} held-out tokens')
    reports = tuple(measured(name, one, model, held_out) for name, one in (('original', model), ('quantized', made)))
    layers = layer_reports(model, params, formats, compared)
    both, kept, tokens = (reports[0], reports[1]), left_out(model.params, formats), real_tokens(calibration)
    return Quantized(made, layers, both, kept, tokens, how, _unseen(cfg, formats, compared), cache)


def formats_of(model: Model, recipe: Recipe, kv_cache: KVCache) -> dict[str, Format]:
    """The format of every weight that is quantized; none at all where the cache alone is.

    Raises:
        ValueError: a recipe that does not fit the model.
    """
    alone = kv_cache != 'as_it_is' and all(choice.format is None for choice in recipe)
    return {} if alone else chosen(model.params, recipe)


def _unseen(cfg: ModelConfig, formats: Mapping[str, Format], statistics: Calibration) -> dict[int, list[int]]:
    found: dict[int, set[int]] = {}
    for path, experts in unseen_experts(formats, statistics).items():
        for repeat, expert in experts:
            found.setdefault(cfg.layer_index(*place_of(path)[:2], repeat), set()).add(expert)
    return {layer: sorted(experts) for layer, experts in sorted(found.items())}


def layer_reports(
    model: Model, params: Any, formats: Mapping[str, Format], compared: Calibration | None
) -> list[LayerReport]:
    """A report per layer and weight, the worst output first, then the worst weight."""
    weights = dict(zip(paths(model.params), jax.tree.leaves(model.params), strict=True))
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    tensors = dict(zip(paths(params, lambda leaf: isinstance(leaf, QTensor)), leaves, strict=True))
    found = []
    for path, form in formats.items():
        amax, error, clipped = (np.asarray(part, np.float64) for part in _weight_errors(weights[path], tensors[path]))
        node = None if compared is None else node_of(path, compared)
        output = None if node is None else node['output']
        segment, kind = map(int, path.split('/')[1].split('.'))
        for repeat in range(len(amax)):
            snr = None
            if output is not None:
                signal, noise = float(np.sum(output['signal'][repeat])), float(np.sum(output['noise'][repeat]))
                snr = _decibels(signal, noise)
            layer = model.config.layer_index(segment, kind, repeat)
            values = float(amax[repeat]), float(error[repeat]), float(clipped[repeat])
            found.append(LayerReport(layer, path, form, *values, snr))
    return sorted(found, key=lambda one: (_badness(one.snr), -one.error))


def _decibels(signal: float, noise: float) -> float:
    """Of signal over noise; infinite where there is no noise, NaN where either is no number."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else -math.inf if noise > 0 else math.inf


def _badness(snr: float | None) -> float:
    """What reports are sorted by: outputs that are no numbers first, those that were not measured last."""
    if snr is None:
        return math.inf
    return -math.inf if math.isnan(snr) else snr


@jax.jit
def _weight_errors(weight: jax.Array, tensor: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every layer [R]: the largest absolute value, the relative error, and the share that is clipped."""
    wide, numbers = weight.astype(jnp.float32), numbers_of(tensor)
    factor = jnp.ones(()) if tensor.input_factor is None else jnp.asarray(tensor.input_factor)[..., None, :]
    factor = jnp.broadcast_to(factor, wide.shape)
    axes = tuple(range(1, wide.ndim))
    size = jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes))
    error = jnp.sqrt(jnp.sum(jnp.square(wide - numbers * factor), axis=axes))
    largest = tensor.format.largest * BEYOND * number_of(jnp.asarray(tensor.scale), tensor.scale_2, tensor.format)
    clipped = jnp.mean(jnp.abs(wide / factor) > spread(largest, wide.shape, tensor.format), axis=axes)
    return jnp.max(jnp.abs(wide), axis=axes), jnp.where(size > 0, error / size, 0), clipped


def measured(name: str, model: Model, original: Model, batches: Sequence[Batch]) -> ModelReport:
    """Loss and divergence of a model on the predicted tokens of the batches."""
    totals = np.zeros(4)
    for batch in batches:
        reference = Reference(original.config, original.params)
        scores = score(model.config, model.params, batch, reference=reference, compute=original.compute)
        parts = -scores.log_prob, scores.kl, scores.agreement, jnp.ones_like(scores.kl)
        totals += [float(np.sum(np.asarray(part, np.float64) * batch.loss_mask)) for part in parts]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params))
    loss, kl, agreement = totals[:3] / totals[3]
    return ModelReport(name, size, float(loss), float(kl), float(agreement))
