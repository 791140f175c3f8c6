"""Log-probabilities of given tokens, without the logits of a whole batch in memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.models.config import Compute, ModelConfig
from jpt.models.transformer import forward, unembed


class Scores(NamedTuple):
    """Of every position [B, T]: log-probability of its target, whether that is the likeliest token, both float32.

    `kl` is the divergence KL(reference || model) and `agreement` whether both have the same likeliest token; zeros
    without a reference.
    """

    log_prob: jax.Array
    greedy: jax.Array
    kl: jax.Array
    agreement: jax.Array


class Reference(NamedTuple):
    """A model to compare with: same vocabulary."""

    cfg: ModelConfig
    params: Any


@functools.partial(jax.jit, static_argnames=('cfg', 'reference_cfg', 'compute', 'chunk'))
def _score(
    cfg: ModelConfig,
    params: Any,
    batch: Batch,
    reference_cfg: ModelConfig | None,
    reference_params: Any,
    compute: Compute,
    chunk: int,
) -> Scores:
    models = [(cfg, params)] + ([(reference_cfg, reference_params)] if reference_cfg else [])
    hidden = [
        forward(c, p, batch.tokens, batch.positions, batch.segment_ids, compute=compute).hidden_BTD.reshape(-1, c.width)
        for c, p in models
    ]
    count = batch.tokens.size
    rows = -count % chunk

    def of_chunk(parts: tuple[list[jax.Array], jax.Array]) -> Scores:
        """Scores [chunk] from the hidden states [chunk, D] of each model, whose logits exist only here."""
        hidden_parts, targets = parts
        logits = [unembed(c, p, part) for (c, p), part in zip(models, hidden_parts, strict=True)]
        log_p = jax.nn.log_softmax(logits[0], axis=-1)
        best = jnp.argmax(logits[0], axis=-1)
        picked = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
        zeros = jnp.zeros_like(picked)
        kl, agreement = zeros, zeros
        if reference_cfg is not None:
            log_q = jax.nn.log_softmax(logits[1], axis=-1)
            ratio = jnp.where(jnp.isfinite(log_q), log_q - log_p, 0)  # rows that pad a vocabulary have no probability
            kl = jnp.sum(jnp.exp(log_q) * ratio, axis=-1)
            agreement = (jnp.argmax(logits[1], axis=-1) == best).astype(jnp.float32)
        return Scores(picked, (best == targets).astype(jnp.float32), kl, agreement)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, rows),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(-1, chunk, *x.shape[1:])

    scores = jax.lax.map(of_chunk, ([cut(h) for h in hidden], cut(batch.targets.reshape(-1))))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(batch.tokens.shape), scores)


def score(
    cfg: ModelConfig,
    params: Any,
    batch: Batch,
    *,
    reference: Reference | None = None,
    compute: Compute = Compute(),  # noqa: B008 (frozen)
    chunk: int = 256,
) -> Scores:
    """Scores of a batch's targets under a model, and against a reference where one is given.

    Raises:
        ValueError: the reference has another vocabulary.
    """
    if reference is not None and reference.cfg.vocab_size != cfg.vocab_size:
        raise ValueError(
            f'reference vocab_size={reference.cfg.vocab_size}: expected the vocabulary of the model, {cfg.vocab_size}'
        )
    ref_cfg, ref_params = reference if reference is not None else (None, None)
    return _score(cfg, params, batch, ref_cfg, ref_params, compute, min(chunk, batch.tokens.size))
