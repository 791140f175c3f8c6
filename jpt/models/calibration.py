"""Statistics of a model over calibration data: what its linear layers read, and how much each layer changes."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jpt.kernels.staged_scan import staged_scan
from jpt.models.block import Block
from jpt.models.config import Compute, ModelConfig, Segment
from jpt.models.transformer import Params, embed, locate
from jpt.quant.paths import map_with_path
from jpt.quant.statistics import CALIBRATION, COMPARED, FACTORS, LARGEST, WATCH, Watch

STATISTICS = ('absolute', 'square')


class Tokens(Protocol):
    """What is read of a batch, all [B, T]; padding has segment 0."""

    @property
    def tokens(self) -> Any: ...

    @property
    def positions(self) -> Any: ...

    @property
    def segment_ids(self) -> Any: ...


class Calibration(NamedTuple):
    """Sums and maxima over the real tokens of all batches, float64 on the host.

    tokens: how many there were.
    layers: as params['layers'], [segment][kind] and stacked on the repeats R. In the place of a linear layer's weights
        stands {'input': {statistic: [R, in]}}; beside them 'cosine' [R], of every layer between what enters and leaves,
        and 'entering' [R, D], the square of each hidden dimension that enters over the mean of all. With the statistic
        'cache', in the place of an attention layer, 'cache' {'k', 'v': {'largest': [R]}} of its keys and values.
    leaving: the same of what leaves the last layer, [D].
    """

    tokens: Any
    layers: list[list[dict[str, Any]]]
    leaving: Any


def calibrate(
    cfg: ModelConfig,
    params: Params,
    batches: Iterable[Tokens],
    statistics: tuple[str, ...] = STATISTICS,
    compute: Compute = Compute(),  # noqa: B008 (frozen)
    compared: Params | None = None,
    factors: Params | None = None,
) -> Calibration:
    """The statistics of a model over batches of one shape. Padding is left out.

    Measured are the inputs of `Linear` modules, not those of routers. Of experts, whose tokens are others, everything
    is by expert, and 'tokens' [R, E] says how many each had (jpt/models/expert_statistics.py).
    `compared` is a tree of the same model with other weights, such as quantized ones: then 'output' {'signal', 'noise':
    [R]} has the squares of every layer's output and of what it is off with the other weight, from the same input.
    `factors` is a tree with {'input_factor': [R, in]} in the place of layers' weights: their inputs are measured
    multiplied by it. Both may have some of the layers only.
    Parameters and batches may lie on a mesh that divides the rows. A batch is summed in float32 at least, batches in
    float64: sums over millions of tokens would lose digits.

    Raises:
        ValueError: an unknown statistic, or no real token.
    """
    found: Calibration | None = None
    for batch in batches:
        places = batch.tokens, batch.positions, batch.segment_ids
        one = layer_statistics(cfg, params, *places, statistics, compute, compared, factors)
        one = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), one)
        found = one if found is None else map_with_path(_joined, found, one)
    if found is None or not found.tokens:
        raise ValueError('calibration: no batch has a real token, so there is nothing to measure')
    return found._replace(tokens=float(found.tokens))


@partial(jax.jit, static_argnums=(0, 5, 6))
def layer_statistics(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    statistics: tuple[str, ...],
    compute: Compute,
    compared: Params | None = None,
    factors: Params | None = None,
) -> Calibration:
    """The sums of one batch [B, T], at least float32, on device."""
    wide = jnp.promote_types(compute.dtype, jnp.float32)
    watch = Watch((segments_BT > 0).astype(wide), statistics)
    where = locate(cfg, positions_BT, segments_BT, compute.dtype)
    hidden_BTD = embed(cfg, params, tokens_BT, positions_BT, compute)
    found = []
    trees = {COMPARED: compared, FACTORS: factors}
    beside = {name: tree['layers'] for name, tree in trees.items() if tree is not None}
    for at, segment in enumerate(cfg.segments):
        period = partial(_period, cfg, segment, compute, where, watch)
        others = {name: layers[at] for name, layers in beside.items()}
        hidden_BTD, sums = staged_scan(period, hidden_BTD, (list(params['layers'][at]), others))
        found.append(sums)
    return Calibration(jnp.sum(watch.weights_BT), found, watch.total(_shares(hidden_BTD)))


def _joined(path: str, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A statistic of two sets of tokens together."""
    return np.maximum(one, other) if path.split('/')[-1] == LARGEST else one + other


def _period(
    cfg: ModelConfig,
    segment: Segment,
    compute: Compute,
    where: Any,
    watch: Watch,
    hidden_BTD: jax.Array,
    both: tuple[Any, dict[str, Any]],
) -> tuple[jax.Array, list[dict[str, Any]]]:
    """The layers of one period, and the sums of each."""
    found = []
    layers, others = both
    for at, (kind, params) in enumerate(zip(segment.kinds, layers, strict=True)):
        block = Block(cfg, kind, compute, parent=None)
        variables = {'params': params, WATCH: {'tokens': watch}} | {name: kinds[at] for name, kinds in others.items()}
        after, state = block.apply(variables, hidden_BTD, where, mutable=[CALIBRATION])
        after_BTD = after.hidden_BTD
        cosine, entering = watch.total(_cosine(hidden_BTD, after_BTD)), watch.total(_shares(hidden_BTD))
        found.append({**state.get(CALIBRATION, {}), 'cosine': cosine, 'entering': entering})
        hidden_BTD = after_BTD
    return hidden_BTD, found


def _shares(hidden_BTD: jax.Array) -> jax.Array:
    """x^2 / mean(x^2) of every token; 0 where all of it is zero."""
    square = jnp.square(hidden_BTD.astype(jnp.promote_types(hidden_BTD.dtype, jnp.float32)))
    mean = jnp.mean(square, axis=-1, keepdims=True)
    return jnp.where(mean > 0, square / jnp.where(mean > 0, mean, 1), 0)


def _cosine(one_BTD: jax.Array, other_BTD: jax.Array) -> jax.Array:
    """Of the angle between two vectors of every token, [B, T]; 0 where one of them is zero."""
    one, other = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (one_BTD, other_BTD))
    square = jnp.sum(jnp.square(one), axis=-1) * jnp.sum(jnp.square(other), axis=-1)
    return jnp.sum(one * other, axis=-1) * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
