"""Runs of layers: what one pipeline stage holds of a model, and how its layers are run there."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpt.kernels.grouped_matmul import PRODUCT
from jpt.models.attention import Where
from jpt.models.block import Layered, apply_block, remat_policy
from jpt.models.config import Compute, LayerKind, ModelConfig
from jpt.models.routing import RouterSums, add_layer
from jpt.models.taps import Passed, Slots, filled, layer_taps
from jpt.sharding.fsdp import gather, gathering, keep_activations
from jpt.sharding.layout import RunSegment
from jpt.sharding.rules import units_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRun:
    """The parameters of consecutive layers, as `Objective.stage` gets them: leaves [repeats, ...] by segment and kind.

    `segments` says which kinds of the whole model these are; `first` is the number of the first layer in the model, a
    traced int32 inside a pipeline (None in the frozen twin of a trainable tree).
    """

    layers: Any
    first: Any
    segments: tuple[RunSegment, ...] = dataclasses.field(metadata={'static': True})


def run_layers(
    cfg: ModelConfig,
    layers: LayerRun | Sequence[Sequence[Any]],
    hidden_BTD: jax.Array,
    router: RouterSums | None,
    taps: Slots,
    where: Where,
    compute: Compute,
) -> tuple[jax.Array, RouterSums | None, Slots]:
    """Any run of a model's layers on hidden states [B, T, D], and the sums of their routers on top of `router`.

    `taps`: slots by name (models/taps.py), of which the layers of the run fill theirs. Plain segments are taken for all
    layers of the model. Takes the place of `models.transformer.run_layers` in a training objective. Weights that are
    divided over `fsdp` are gathered layer by layer, and again in the backward pass.
    """
    if not isinstance(layers, LayerRun):
        counts = tuple((len(segment.kinds), segment.repeats) for segment in cfg.segments)
        layers = LayerRun(list(layers), 0, whole_segments(counts))
    first = layers.first
    for segment, params in zip(layers.segments, layers.layers, strict=True):
        blocks = [_layer(cfg, cfg.segments[s].kinds[k], compute) for s, k in segment.kinds]
        own = {name: taps[name] for name in _own_taps(taps, first, len(blocks) * segment.repeats)}

        def period(carry: Any, step: Any, blocks: list[Any] = blocks, first: Any = first) -> tuple[Any, None]:
            (hidden, router, own), (period_params, repeat) = carry, step
            for kind, (block, layer_params) in enumerate(zip(blocks, period_params, strict=True)):
                layer = first + repeat * len(blocks) + kind
                after = block(layer_params, hidden, where)
                router = add_layer(router, layer, after.router)
                own = filled(own, layer, Passed(hidden, after.hidden_BTD, after.mixed_BTD))
                hidden = after.hidden_BTD
            return (hidden, router, own), None

        steps = (params, jnp.arange(segment.repeats, dtype=jnp.int32))
        unroll = min(compute.unroll, segment.repeats)
        (hidden_BTD, router, own), _ = jax.lax.scan(period, (hidden_BTD, router, own), steps, unroll=unroll)
        taps = taps | own
        first = first + len(blocks) * segment.repeats
    return hidden_BTD, router, taps


def _own_taps(taps: Slots, first: Any, count: int) -> list[str]:
    """The taps of some layers; of all layers where it is not known before the program runs which ones these are."""
    return layer_taps(taps, first, first + count) if isinstance(first, int) else layer_taps(taps, 0, sys.maxsize)


def _layer(cfg: ModelConfig, kind: LayerKind, compute: Compute) -> Callable[[Any, jax.Array, Where], Layered]:
    """A layer that gathers its weights first; nothing but the layer where they are not divided.

    Gather and layer share one checkpoint: the policy of an outer one would also govern what is inside an inner one.
    """
    divided = gathering()
    block = apply_block(cfg, kind, dataclasses.replace(compute, remat='none') if divided else compute)

    def apply(params: Any, hidden_BTD: jax.Array, where: Where) -> Layered:
        return block(gather(params, compute.dtype, units_of(cfg)), hidden_BTD, where)

    def regathered(params: Any, hidden_BTD: jax.Array, where: Where) -> Layered:
        policy = keep_parts(params) if compute.remat == 'none' else remat_policy(compute.remat)
        return jax.checkpoint(apply, policy=policy)(params, hidden_BTD, where)

    return regathered if divided else apply


def keep_parts(params: Any) -> Callable[..., Any]:
    """The policy of a layer that keeps everything but its gathered weights; experts' rows are known by their name."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(keep_activations(params), policies.save_only_these_names(PRODUCT))


def whole_segments(counts: tuple[tuple[int, int], ...]) -> tuple[RunSegment, ...]:
    """The segments of a whole model from (number of kinds, repeats) of each."""
    return tuple(
        RunSegment(tuple((segment, kind) for kind in range(kinds)), repeats)
        for segment, (kinds, repeats) in enumerate(counts)
    )
