"""The token loss of a teacher with another vocabulary: what both have is compared word by word, the rest by its order.

The words that the teacher finds likeliest and that the student has too are one sparse target, everything else of either
side is its tail: the divergences are those of these J + 1 buckets, whatever else the vocabularies hold. Within the tail
the words that only one side has are compared by their sorted probabilities (Universal Logit Distillation, Boizard et
al. 2024, arXiv 2402.12030, equation 5), which draws the student to distributions of the teacher's shape.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpt.kernels.distillation_loss import Distillation
from jpt.kernels.likely_words import top_words
from jpt.kernels.local import axis_index
from jpt.kernels.sparse_target import SparseTarget
from jpt.kernels.token_losses import TokenLoss
from jpt.kernels.vocab_shard import VocabShard


class AlignedTarget(NamedTuple):
    """What a teacher says of the student's positions, [B, T, J] and [B, T].

    shared: its likely words that the student has, with the student's ids; the mass of all others is its tail. Where no
    position of the teacher has read the same text there is no word, and all mass is tail. unshared: log-probabilities
    of its likely words that the student lacks, -inf elsewhere. aligned: 1 or 0.
    """

    shared: SparseTarget
    unshared: jax.Array
    aligned: jax.Array


def align_target(likely: SparseTarget, at_BT, table_V) -> AlignedTarget:
    """The likeliest words of a teacher [B, U, J] at the positions `at` [B, T] of a student, in the student's words.

    at: int32, the position in the teacher's row, or -1. table: int32, the student's id of every word of the teacher,
    or -1; no id twice.
    """
    aligned = at_BT >= 0
    at = jnp.maximum(at_BT, 0)
    words, logp = (jnp.take_along_axis(x, at[..., None], axis=1) for x in (likely.ids, likely.logp))
    ids = jnp.where(aligned[..., None], jnp.asarray(table_V)[words], -1)
    unshared = jnp.where((ids < 0) & aligned[..., None], logp, -jnp.inf)
    tail = jnp.logaddexp(jnp.take_along_axis(likely.tail(), at, axis=1), jax.nn.logsumexp(unshared, axis=-1))
    shared = SparseTarget(ids, jnp.where(ids < 0, -jnp.inf, logp), jnp.where(aligned, tail, 0))
    return AlignedTarget(shared, unshared, aligned.astype(logp.dtype))


@dataclasses.dataclass(frozen=True)
class AlignedDistillation:
    """See `aligned_distillation`."""

    divergences: Distillation
    uld: float

    @property
    def per_aligned(self) -> tuple[str, ...]:
        """Metrics that are 0 where nothing is aligned, so that their mean is over `aligned`."""
        base = self.divergences
        own = ('uld', 'unshared', 'agreement', 'teacher_entropy', 'tail', 'student_tail')
        return (*base.names, *(name for name in own if name in self.metrics))

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.divergences.metrics, 'aligned', 'unshared', *(('uld', 'uld_weighted') if self.uld else ()))

    def __call__(self, logits_CV, args, shared, vocab: VocabShard):
        base, target = self.divergences, args['aligned_target']
        loss, dlogits, metrics = base(logits_CV, args | {'sparse_target': target.shared}, shared, vocab)
        # The teacher's likeliest word may be one that the student lacks.
        own = jnp.max(target.shared.logp, axis=-1) >= jnp.max(target.unshared, axis=-1)
        metrics |= {'aligned': target.aligned, 'unshared': jnp.sum(jnp.exp(target.unshared), axis=-1)}
        metrics['agreement'] *= own
        if self.uld:
            peak = vocab.max(logits_CV) / base.temperature
            cooled_CV = logits_CV / base.temperature
            logq_CV = cooled_CV - vocab.log_normalizer(cooled_CV, peak)[:, None]
            value, gradient = sorted_difference(target.unshared, logq_CV, shared['lacking'], vocab)
            squared = base.temperature**2 if base.squared else 1
            weight = self.uld * (1 - base.weights(args)[1]) * squared * target.aligned
            dlogits += (weight / base.temperature)[:, None] * gradient
            loss += weight * value
            metrics |= {'loss': loss, 'uld': value, 'uld_weighted': weight * value}
        metrics |= {name: metrics[name] * target.aligned for name in self.per_aligned}
        return loss, dlogits, metrics


def sorted_difference(logp_CJ, logq_CV, lacking_V1, vocab: VocabShard):
    """(value_C, dlogits_CV): sum over k of |p_(k) - q_(k)|, the k-th largest probabilities of words of one side alone.

    logp: of the teacher's such words, in any order, -inf where there are fewer. q: the J largest of the student's among
    the columns where `lacking` holds. A probability without a partner is compared with 0. The gradient is in the
    student's logits, of which logq are the log-probabilities, with the order as it is.
    """
    count = logp_CJ.shape[-1]
    among = min(count, vocab.vocab_size)
    logq_CJ, ids_CJ = top_words(among, jnp.where(lacking_V1[:, 0][None], vocab.mask(logq_CV), -jnp.inf), vocab)
    p, q = jnp.exp(jax.lax.top_k(logp_CJ, count)[0]), jnp.exp(logq_CJ)
    q = jnp.pad(q, ((0, 0), (0, count - among)))
    value = jnp.sum(jnp.abs(p - q), axis=-1)
    slopes = (q * jnp.sign(q - p))[:, :among]
    column = ids_CJ - axis_index(vocab.axes) * vocab.size
    at = jnp.where((column >= 0) & (column < vocab.size), column, vocab.size)  # elsewhere: dropped
    shared_out = -jnp.exp(logq_CV) * jnp.sum(slopes, axis=-1)[:, None]
    return value, shared_out.at[jnp.arange(len(q))[:, None], at].add(slopes, mode='drop')


def aligned_distillation(divergences: TokenLoss, *, uld: float = 1.0) -> AlignedDistillation:
    """Divergences on shared words and the rest, and alpha T^2 uld times the sorted difference of words not shared.

    divergences: a `distillation` with form 'tail'. Reads args['aligned_target'] (an AlignedTarget [N, J]) in place of a
    sparse target, and with `uld` shared['lacking'] (bool [V, 1], the student's words that the teacher lacks).

    Reports beside the metrics of the divergences 'aligned', 'unshared' (the teacher's mass on likely words that the
    student lacks), 'uld' and 'uld_weighted'. What says something of the teacher is 0 where nothing is aligned.

    Raises:
      ValueError: divergences that are not of a sparse target with a tail, or a negative weight.
    """
    if not isinstance(divergences, Distillation) or divergences.form != 'tail':
        raise ValueError("aligned_distillation: expected a distillation with form='tail'")
    if uld < 0:
        raise ValueError(f'aligned_distillation: uld={uld}: expected a number of 0 or more')
    return AlignedDistillation(divergences, float(uld))
