"""Runs of layers: what one pipeline stage holds of a model, and how its layers are run there."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jpt.models.attention import Where
from jpt.models.block import apply_block, remat_policy
from jpt.models.config import Compute, LayerKind, ModelConfig
from jpt.sharding.fsdp import gather, gathering, keep_activations
from jpt.sharding.layout import RunSegment


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
    where: Where,
    compute: Compute,
) -> tuple[jax.Array, None, dict[str, jax.Array]]:
    """Any run of a model's layers on hidden states [B, T, D]; plain segments are taken for all layers of the model.

    Takes the place of `models.transformer.run_layers` in a training objective. Weights that are divided over `fsdp` are
    gathered layer by layer, and again in the backward pass.
    """
    if not isinstance(layers, LayerRun):
        counts = tuple((len(segment.kinds), segment.repeats) for segment in cfg.segments)
        layers = LayerRun(list(layers), 0, whole_segments(counts))
    for segment, params in zip(layers.segments, layers.layers, strict=True):
        blocks = [_layer(cfg, cfg.segments[s].kinds[k], compute) for s, k in segment.kinds]

        def period(hidden: jax.Array, period_params: Any, blocks: list[Any] = blocks) -> tuple[jax.Array, None]:
            for block, layer_params in zip(blocks, period_params, strict=True):
                hidden = block(layer_params, hidden, where)
            return hidden, None

        hidden_BTD, _ = jax.lax.scan(period, hidden_BTD, params, unroll=min(compute.unroll, segment.repeats))
    return hidden_BTD, None, {}


def _layer(cfg: ModelConfig, kind: LayerKind, compute: Compute) -> Callable[[Any, jax.Array, Where], jax.Array]:
    """A layer that gathers its weights first; nothing but the layer where they are not divided.

    Gather and layer share one checkpoint: the policy of an outer one would also govern what is inside an inner one.
    """
    divided = gathering()
    block = apply_block(cfg, kind, dataclasses.replace(compute, remat='none') if divided else compute)

    def apply(params: Any, hidden_BTD: jax.Array, where: Where) -> jax.Array:
        return block(gather(params, compute.dtype, cfg.num_kv_heads), hidden_BTD, where)[0]

    if not divided:
        return apply
    return jax.checkpoint(apply, policy=keep_activations if compute.remat == 'none' else remat_policy(compute.remat))


def whole_segments(counts: tuple[tuple[int, int], ...]) -> tuple[RunSegment, ...]:
    """The segments of a whole model from (number of kinds, repeats) of each."""
    return tuple(
        RunSegment(tuple((segment, kind) for kind in range(kinds)), repeats)
        for segment, (kinds, repeats) in enumerate(counts)
    )
