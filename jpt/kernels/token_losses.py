"""Losses of single tokens on a chunk of logits, with their gradients by hand, over a vocabulary that may be cut.

A token loss is a hashable callable (logits_CV, args, shared, vocab) -> (loss_C, dlogits_CV, {name: values_C}): the loss
of every token, its gradient with respect to the local logits, and what to report. It names its metrics in `metrics`.
Written with `VocabShard`, it is the same for a whole vocabulary and for a part; nothing is differentiated through.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jpt.kernels.vocab_shard import VocabShard


class TokenLoss(Protocol):
    """What `linear_loss` calls; implementations are frozen dataclasses, so that they can be static arguments."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what the third result holds."""

    def __call__(self, logits_CV: jax.Array, args: Any, shared: Any, vocab: VocabShard) -> tuple[Any, Any, Any]:
        """(loss_C, dlogits_CV, {name: values_C}), all in the dtype of the logits."""


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """See `cross_entropy`."""

    z_loss: float
    metrics: tuple[str, ...] = ('loss', 'ce', 'accuracy')

    def __call__(self, logits_CV, args, shared, vocab: VocabShard):
        del shared
        targets = args['targets']
        peak = vocab.max(logits_CV)
        lse = vocab.log_normalizer(logits_CV, peak)
        target_logit = vocab.sum(vocab.pick(logits_CV, targets))
        ce = lse - target_logit
        loss = ce + self.z_loss * lse**2
        slope = 1 + 2 * self.z_loss * lse
        dlogits = slope[:, None] * jnp.exp(logits_CV - lse[:, None]) - vocab.hits(targets)
        return loss, dlogits, {'loss': loss, 'ce': ce, 'accuracy': (target_logit >= peak).astype(loss.dtype)}


def cross_entropy(*, z_loss: float = 0.0) -> TokenLoss:
    """-log softmax(logits)[target] + z_loss * logsumexp(logits)^2; reads args['targets'] (int32 [N]).

    Reports 'loss', 'ce' (without the z term) and 'accuracy' (no logit is above the target's). The z term is that of
    PaLM (Chowdhery et al. 2022, section 5).
    """
    return CrossEntropy(z_loss)
