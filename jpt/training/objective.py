"""What is minimized: four pure functions that the plain step composes and the pipeline calls stage by stage.

A loss is a sum and a count. The counts of the whole global batch are computed first and enter before the head, so loss
and gradient do not depend on microbatching, data parallelism, packing or chunking.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import cross_entropy
from jpt.models.config import Compute, ModelConfig
from jpt.models.transformer import embed, final_norm, head_kernel, locate
from jpt.sharding.stages import run_layers
from jpt.training.freeze import merge

Tree = Any
Sums = dict[str, tuple[jax.Array, jax.Array]]


class Objective(NamedTuple):
    """The four functions of a training objective.

    `params` holds the trainable leaves (None where frozen); `frozen['model']` the others, and `frozen['teacher']` a
    teacher where there is one. `layers` and `frozen_layers` are any run of layers (`sharding.stages.LayerRun`), of the
    model and of everything frozen.
    The carry is a pytree of float arrays that rides from stage to stage.
    """

    counts: Callable[[Batch], dict[str, jax.Array]]  # global counts, from the whole batch
    first: Callable[[Tree, Tree, Batch], Tree]  # (params, frozen, micro) -> carry
    stage: Callable[[Tree, Tree, Tree, Batch], Tree]  # (layers, frozen_layers, carry, micro) -> carry
    last: Callable[[Tree, Tree, Tree, Batch, dict[str, jax.Array]], tuple[jax.Array, Sums]]


def token_counts(batch: Batch) -> dict[str, jax.Array]:
    """How much loss weight the whole batch holds."""
    return {'tokens': jnp.sum(batch.loss_mask, dtype=jnp.promote_types(batch.loss_mask.dtype, jnp.float32))}


def token_weights(micro: Batch, counts: dict[str, jax.Array]) -> jax.Array:
    """The weight [B, T] of every token of a microbatch in the loss of the whole batch; zeros where that is empty."""
    total = counts['tokens']
    return micro.loss_mask / jnp.where(total > 0, total, 1)


def in_tokens(result: tuple[jax.Array, Sums], counts: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
    """The same loss, with metrics as sums over tokens, so that they can be added over batches of different size."""
    total, sums = result
    return total, {name: (part * counts['tokens'], weight * counts['tokens']) for name, (part, weight) in sums.items()}


def language_modeling(cfg: ModelConfig, compute: Compute) -> Objective:
    """Next-token cross-entropy: the mean over the tokens of the loss mask. For pretraining and supervised tuning."""

    def first(params: Tree, frozen: Tree, micro: Batch) -> jax.Array:
        return embed(cfg, merge(params, frozen['model']), micro.tokens, micro.positions, compute)

    def stage(layers: Tree, frozen_layers: Tree, hidden: jax.Array, micro: Batch) -> jax.Array:
        where = locate(cfg, micro.positions, micro.segment_ids, compute.dtype)
        return run_layers(cfg, merge(layers, frozen_layers['model']), hidden, where, compute)[0]

    def last(
        params: Tree, frozen: Tree, hidden: jax.Array, micro: Batch, counts: dict[str, jax.Array]
    ) -> tuple[jax.Array, Sums]:
        """Cross-entropy from the hidden states after the last layer."""
        model = merge(params, frozen['model'])
        result = linear_loss(
            final_norm(cfg, model, hidden),
            head_kernel(cfg, model),
            token_weights(micro, counts),
            {'targets': micro.targets},
            cross_entropy(),
            vocab_size=cfg.vocab_size,
            soft_cap=cfg.logit_soft_cap,
        )
        return in_tokens(result, counts)

    return Objective(token_counts, first, stage, last)
