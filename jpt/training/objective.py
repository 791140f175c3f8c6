"""What is minimized: four pure functions that the plain step composes and the pipeline calls stage by stage.

A loss is a sum and a count. The counts of the whole global batch are computed first and enter before the head, so loss
and gradient do not depend on microbatching, data parallelism, packing or chunking.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import TokenLoss, cross_entropy
from jpt.models.config import Compute, ModelConfig
from jpt.models.routing import RouterSums, no_sums
from jpt.models.taps import EMBEDDED, NORMED, Slots, empty_slots
from jpt.models.transformer import embed, final_norm, head_kernel, locate
from jpt.sharding.stages import run_layers
from jpt.training.auxiliary import After, Auxiliary, Counts, Sums
from jpt.training.freeze import merge

Tree = Any
Mixture = Callable[[Any, Any], jax.Array]  # (updates made so far, dtype) -> the weights of a loss's parts


class Objective(NamedTuple):
    """The four functions of a training objective.

    `params` holds the trainable leaves (None where frozen); `frozen['model']` the others, and `frozen['teacher']` a
    teacher where there is one. `layers` and `frozen_layers` are any run of layers (`sharding.stages.LayerRun`), of the
    model and of everything frozen.
    The carry is a pytree of float arrays that rides from stage to stage.
    """

    counts: Callable[[Batch, Any], Counts]  # global numbers, from the whole batch and the updates made so far
    first: Callable[[Tree, Tree, Batch], Tree]  # (params, frozen, micro) -> carry
    stage: Callable[[Tree, Tree, Tree, Batch], Tree]  # (layers, frozen_layers, carry, micro) -> carry
    last: Callable[[Tree, Tree, Tree, Batch, Counts], tuple[jax.Array, Sums]]
    reads_load: bool = False  # `last` finds counts['load'], that of the whole batch, where there are microbatches


class Carry(NamedTuple):
    """What rides through the layers of a model: hidden states [B, T, D], sums of its routers, a slot for every tap."""

    hidden_BTD: jax.Array
    router: RouterSums | None  # None for a model without experts
    taps: Slots  # [B, T, D] each


def first_carry(cfg: ModelConfig, params: Tree, micro: Batch, compute: Compute, taps: Sequence[str] = ()) -> Carry:
    """What enters the first layer of a model; `last` has the final norm itself, so that needs no slot."""
    hidden_BTD = embed(cfg, params, micro.tokens, micro.positions, compute)
    slots = empty_slots([name for name in taps if name not in (EMBEDDED, NORMED)], hidden_BTD)
    if EMBEDDED in taps:
        slots[EMBEDDED] = hidden_BTD
    return Carry(hidden_BTD, no_sums(cfg, compute.dtype), slots)


def token_counts(batch: Batch) -> Counts:
    """How much loss weight the whole batch holds, and how many tokens that are not padding."""
    wide = jnp.promote_types(batch.loss_mask.dtype, jnp.float32)
    return {
        'tokens': jnp.sum(batch.loss_mask, dtype=wide),
        'real_tokens': jnp.sum(batch.segment_ids > 0, dtype=wide),
    }


def token_weights(micro: Batch, counts: Counts) -> jax.Array:
    """The weight [B, T] of every token of a microbatch in the loss of the whole batch; zeros where that is empty."""
    total = counts['tokens']
    return micro.loss_mask / jnp.where(total > 0, total, 1)


def in_tokens(result: tuple[jax.Array, Sums], counts: Counts) -> tuple[jax.Array, Sums]:
    """The same loss, with metrics as sums over tokens, so that they can be added over batches of different size."""
    total, sums = result
    return total, {name: (part * counts['tokens'], weight * counts['tokens']) for name, (part, weight) in sums.items()}


def weights_at(mixture: Mixture | None, step: Any, batch: Batch) -> Counts:
    """The weights of a mixture after so many updates, for the counts."""
    wide = jnp.promote_types(batch.loss_mask.dtype, jnp.float32)
    return {} if mixture is None else {'mixture': mixture(step, wide)}


def loss_args(micro: Batch, counts: Counts) -> dict[str, Any]:
    """What a token loss reads of a batch, and the weights of its parts where these change from step to step."""
    args: dict[str, Any] = {'targets': micro.targets}
    if micro.sparse_target is not None:
        args['sparse_target'] = micro.sparse_target
    if 'mixture' in counts:
        args['mixture'] = for_all_tokens(counts['mixture'], micro)
    return args


def for_all_tokens(values: jax.Array, micro: Batch) -> jax.Array:
    """Values [N] that hold for every token, as a token loss takes them: [B, T, N]."""
    return jnp.broadcast_to(values, (*micro.targets.shape, *values.shape))


def language_modeling(
    cfg: ModelConfig,
    compute: Compute,
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008 (frozen)
    token_loss: TokenLoss = cross_entropy(),  # noqa: B008 (frozen)
    mixture: Mixture | None = None,
) -> Objective:
    """The mean over the tokens of the loss mask of a loss on next tokens: cross-entropy for pretraining and tuning.

    token_loss: reads the batch's targets, and its sparse_target where there is one (recorded distillation), and what
    `mixture` gives where the weights of its parts change from step to step.
    """

    def counts(batch: Batch, step: Any = 0) -> Counts:
        return token_counts(batch) | auxiliary.counts(cfg, batch) | weights_at(mixture, step, batch)

    def first(params: Tree, frozen: Tree, micro: Batch) -> Carry:
        return first_carry(cfg, merge(params, frozen['model']), micro, compute)

    def stage(layers: Tree, frozen_layers: Tree, carry: Carry, micro: Batch) -> Carry:
        where = locate(cfg, micro.positions, micro.segment_ids, compute.dtype)
        return Carry(*run_layers(cfg, merge(layers, frozen_layers['model']), *carry, where, compute))

    def last(params: Tree, frozen: Tree, carry: Carry, micro: Batch, counts: Counts) -> tuple[jax.Array, Sums]:
        """The token loss from the hidden states after the last layer."""
        model = merge(params, frozen['model'])
        hidden_BTD = final_norm(cfg, model, carry.hidden_BTD)
        result = linear_loss(
            hidden_BTD,
            head_kernel(cfg, model),
            token_weights(micro, counts),
            loss_args(micro, counts),
            token_loss,
            vocab_size=cfg.vocab_size,
            soft_cap=cfg.logit_soft_cap,
        )
        after = After(model, hidden_BTD, carry.router)
        return auxiliary.added(in_tokens(result, counts), cfg, after, micro, counts, compute)

    return Objective(counts, first, stage, last, auxiliary.reads_load(cfg))
