"""The losses of modules that predict further tokens: a batch seen from ahead, and what is added to an objective."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.local import next_column
from jpt.kernels.parallel_attention import SEQUENCE
from jpt.kernels.token_losses import cross_entropy
from jpt.models.config import Compute, ModelConfig
from jpt.models.mtp import modules
from jpt.models.routing import RouterSums, add_layer
from jpt.models.transformer import Params, embed, head_kernel, locate


def ahead(batch: Batch, depth: int) -> Iterator[Batch]:
    """The batch as module 1, 2, ... `depth` sees it: at every place the token that comes so much later, and its target.

    Where a text ends before that, the segment is 0 and the target weighs nothing. Positions stay.
    """
    # What teachers say is of the next token, not of further ones.
    later = batch = batch._replace(sparse_target=None, teacher=None, route=None)
    for _ in range(depth):
        # Targets may be anything where they weigh nothing: the tokens themselves move up.
        later = jax.tree.map(lambda x: next_column(x, [SEQUENCE]), later)
        inside = later.segment_ids == batch.segment_ids
        segments, mask = jnp.where(inside, batch.segment_ids, 0), jnp.where(inside, later.loss_mask, 0)
        later = later._replace(loss_mask=mask, positions=batch.positions, segment_ids=segments)
        yield later


def mtp_counts(batch: Batch, depth: int) -> dict[str, jax.Array]:
    """How much loss weight the whole batch holds for each module, by 'mtp_1', 'mtp_2', ..."""
    wide = jnp.promote_types(batch.loss_mask.dtype, jnp.float32)
    return {f'mtp_{k}': jnp.sum(later.loss_mask, dtype=wide) for k, later in enumerate(ahead(batch, depth), 1)}


def mtp_losses(
    cfg: ModelConfig,
    params: Params,
    hidden_BTD: jax.Array,
    router: RouterSums | None,
    micro: Batch,
    counts: dict[str, jax.Array],
    compute: Compute,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]], RouterSums | None]:
    """The mean over modules of their cross-entropies, each a mean over the tokens that it predicts.

    hidden_BTD: after the model's final norm. Beside it the metrics 'mtp_1', 'mtp_1_accuracy' and so on, and the
    router's sums with those of the modules, numbered on behind the layers.
    """
    total, metrics = jnp.zeros((), jnp.promote_types(hidden_BTD.dtype, jnp.float32)), {}
    parts = zip(modules(cfg, compute), params['mtp'], ahead(micro, len(cfg.mtp)), strict=True)
    for depth, (module, own, later) in enumerate(parts, 1):
        where = locate(cfg, later.positions, later.segment_ids, compute.dtype)
        embedded_BTD = embed(cfg, params, later.tokens, later.positions, compute)
        hidden_BTD, sums = module(own, hidden_BTD, embedded_BTD, where)
        router = add_layer(router, cfg.num_layers + depth - 1, sums)
        count = counts[f'mtp_{depth}']
        loss, found = linear_loss(
            hidden_BTD,
            head_kernel(cfg, params),
            later.loss_mask / jnp.where(count > 0, count, 1),
            {'targets': later.targets},
            cross_entropy(),
            vocab_size=cfg.vocab_size,
            soft_cap=cfg.logit_soft_cap,
        )
        total = total + loss / len(cfg.mtp)
        for name, metric in ((f'mtp_{depth}', 'loss'), (f'mtp_{depth}_accuracy', 'accuracy')):
            value, weight = found[metric]
            metrics[name] = (value * count, weight * count)
    return total, metrics, router
