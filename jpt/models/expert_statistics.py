"""What the experts of a mixture read over calibration data, and how much each changes with other weights, by expert.

Rows are measured where the experts are, and what was measured travels back to the tokens as outputs do
(`jpt.kernels.expert_parallel.mixture`), so this works on every mesh that the mixture works on.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.expert_parallel import OTHER, TENSOR, Rows, mixture
from jpt.kernels.local import axis_index, axis_size, psum
from jpt.models.config import ModelConfig
from jpt.models.mlp import ACTIVATIONS, gated_unit
from jpt.quant.dot import grouped_dot
from jpt.quant.producers import Deferred
from jpt.quant.statistics import CALIBRATION, COMPARED, LARGEST, SUMS, Watch, watch_of

MEASURES = ('signal', 'noise')


def expert_linear(weights: dict[str, Any], rows: Rows, name: str, x_MI: jax.Array | Deferred) -> jax.Array:
    """One linear map of every row's expert, its bias included."""
    y = grouped_dot(x_MI, weights[name], rows.sizes_E)
    return y + rows.of_expert(weights[f'{name}_bias']).astype(y.dtype) if f'{name}_bias' in weights else y


def observe_experts(
    module: nn.Module,
    cfg: ModelConfig,
    x_BTD: jax.Array,
    ids_BTJ: jax.Array,
    weights_BTJ: jax.Array,
    kernels: dict[str, Any],
    exchange: str,
) -> None:
    """Measures the experts of a mixture that is being applied, where it is watched; see `mixture` for the arguments.

    In the place of the experts' weights then stand {'tokens': [E], how many rows each expert had, and where asked for
    'input': {statistic: [E, in]}, 'output': {'signal', 'noise': [E]}}. There are no histograms of experts.
    """
    watch = watch_of(module)
    if watch is None:
        return
    experts = cfg.experts
    assert experts is not None
    batch, length, choices = ids_BTJ.shape
    copies = jnp.repeat(x_BTD, choices, axis=1)  # one for each choice of a token, side by side
    if experts.on_input:
        copies = copies * weights_BTJ.reshape(batch, -1, 1)
    ids = ids_BTJ.reshape(batch, length * choices, 1)

    def through(run: Any, given: dict[str, Any]) -> jax.Array:
        ones = jnp.ones(ids.shape, copies.dtype)
        found, _ = mixture(partial(run, cfg), copies, ids, ones, given, experts.count, exchange=exchange)
        return found.reshape(-1, found.shape[-1])

    rows = _Rows(ids.reshape(-1), jnp.repeat(watch.weights_BT.reshape(-1), choices), experts.count)
    found: dict[str, dict[str, Any]] = {name: {'tokens': rows.total(1.0)} for name in _names(kernels)}
    if set(watch.statistics) & {*SUMS, LARGEST}:
        outer = rows.measure(watch, copies.reshape(-1, copies.shape[-1]))
        inner = rows.measure(watch, through(_inner_everywhere, kernels))
        for name, node in found.items():
            node['input'] = inner if name == 'down' else outer
    others: dict[str, Any] = {}
    if module.has_variable(COMPARED, 'experts'):
        others = module.get_variable(COMPARED, 'experts')
    if others:
        both = kernels | {f'{name}{OTHER}': other['kernel'] for name, other in others.items()}
        sums = rows.total(through(_compared, both)).reshape(experts.count, -1, len(MEASURES))
        for at, name in enumerate(_names(others)):
            found[name]['output'] = dict(zip(MEASURES, jnp.unstack(sums[:, at], axis=-1), strict=True))
    module.put_variable(CALIBRATION, 'experts', found)


class _Rows:
    """Rows [M], of which each is a token's for one expert; `count` stands for no expert."""

    def __init__(self, ids_M: jax.Array, weights_M: jax.Array, count: int):
        self.ids_M = jnp.where(weights_M > 0, ids_M, count)
        self.weights_M, self.count = weights_M, count

    def total(self, values: jax.Array | float) -> jax.Array:
        """Sums of values [M, ...] over the rows of each expert, [E, ...]."""
        values = jnp.broadcast_to(values, self.weights_M.shape) if jnp.ndim(values) == 0 else jnp.asarray(values)
        wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        weights = self.weights_M.reshape(-1, *(1,) * (wide.ndim - 1)).astype(wide.dtype)
        zeros = jnp.zeros((self.count, *wide.shape[1:]), wide.dtype)
        return zeros.at[self.ids_M].add(jnp.where(weights > 0, wide * weights, 0), mode='drop')

    def measure(self, watch: Watch, x_MI: jax.Array) -> dict[str, jax.Array]:
        """The statistics [E, in] of rows by expert, at least float32."""
        wide = x_MI.astype(jnp.promote_types(x_MI.dtype, jnp.float32))
        found = {name: self.total(SUMS[name](wide)) for name in watch.statistics if name in SUMS}
        if LARGEST in watch.statistics:
            zeros = jnp.zeros((self.count, wide.shape[-1]), wide.dtype)
            found[LARGEST] = zeros.at[self.ids_M].max(jnp.abs(wide), mode='drop')
        return found


def _names(kernels: dict[str, Any]) -> list[str]:
    return [name for name in ('up', 'gate', 'down') if name in kernels]


def _inner(cfg: ModelConfig, weights: dict[str, Any], rows: Rows) -> jax.Array:
    up = expert_linear(weights, rows, 'up', rows.x_MD)
    if 'gate' not in weights:
        return ACTIVATIONS[cfg.activation](up)
    return gated_unit(cfg)(expert_linear(weights, rows, 'gate', rows.x_MD), up)


def _inner_everywhere(cfg: ModelConfig, weights: dict[str, Any], rows: Rows) -> jax.Array:
    """What `down` reads, [M, F] of full width: zeros where other shards of `tensor` have the numbers."""
    inner = _inner(cfg, weights, rows)
    assert cfg.experts is not None
    whole = jnp.zeros((inner.shape[0], cfg.experts.width), inner.dtype)
    return lax.dynamic_update_slice_in_dim(whole, inner, axis_index([TENSOR]) * inner.shape[-1], axis=1)


def _compared(cfg: ModelConfig, weights: dict[str, Any], rows: Rows) -> jax.Array:
    """Of every row and of each weight that there is another for: the square of the output and of the difference, [M, 2
    per weight]; shards of `tensor` have parts of them, which add up."""
    found = []
    for name in _names({name: None for name in weights if f'{name}{OTHER}' in weights}):
        x_MI = _inner(cfg, weights, rows) if name == 'down' else rows.x_MD
        one, other = (grouped_dot(x_MI, weights[each], rows.sizes_E) for each in (name, f'{name}{OTHER}'))
        parts = one.astype(jnp.float32), one.astype(jnp.float32) - other.astype(jnp.float32)
        shards = 1
        if name == 'down':  # whose outputs are sums over the shards themselves
            parts, shards = psum(parts, [TENSOR]), axis_size([TENSOR])
        found += [jnp.sum(jnp.square(part), axis=-1) / shards for part in parts]
    return jnp.stack(found, axis=-1)
