"""A teacher's distribution by its most likely words: divergences between it and a student's whole vocabulary.

What is not among these words is one more bucket by default, so that both sides are distributions on J + 1 buckets and
the gradient is that of the coarse-grained divergence. 'truncated' leaves the bucket out, and 'renormalized' divides
both sides by their sums over the words: what other systems compute, and biased. The first pulls all of the student's
mass onto the words (a reverse divergence pushes it off them, and is refused); the second leaves the mass outside of
them free, whatever the divergence (and reverse ones are refused).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.kernels.divergences import Divergence
from jpt.kernels.local import axis_index
from jpt.kernels.vocab_shard import VocabShard

FORMS = ('tail', 'truncated', 'renormalized')
# The least mass that the words left out are taken to have: a probability in float32 is not exact to more.
LEAST_TAIL = 1e-7


class SparseTarget(NamedTuple):
    """Of N tokens the J words that a teacher finds likeliest; a pytree of jax or numpy arrays [N, J] and [N].

    ids: int32, -1 where there are fewer than J words (top-p). logp: log-probabilities in the whole vocabulary, at the
    temperature of the loss. log_tail: log of the mass of all other words; None takes what the words leave.
    """

    ids: Any
    logp: Any
    log_tail: Any = None

    def tail(self) -> jax.Array:
        """Log of the mass of all other words [N]; at least LEAST_TAIL where it is what the words leave."""
        if self.log_tail is not None:
            wide = jnp.promote_types(self.log_tail.dtype, jnp.float32)
            return jnp.maximum(self.log_tail.astype(wide), jnp.log(jnp.finfo(wide).tiny))
        mass = jnp.sum(jnp.where(self.ids >= 0, jnp.exp(self.logp), 0), axis=-1)
        return jnp.log1p(-jnp.minimum(mass, 1 - LEAST_TAIL))


def no_words(shape: tuple[int, ...], count: int, dtype: Any) -> SparseTarget:
    """Targets [..., count] of numpy arrays without a word, as padding has them; all mass is in the tail."""
    ids = np.full((*shape, count), -1, np.int32)
    return SparseTarget(ids, np.full(ids.shape, -np.inf, dtype), np.zeros(shape, np.promote_types(dtype, np.float32)))


def sparse_divergence(divergence: Divergence, form: str, target: SparseTarget, q_CV, vocab: VocabShard):
    """(value_C, dlogits_CV, tails): the divergence of C tokens from student log-probabilities of the local columns.

    tails: log-mass outside of the words, of teacher and student, [C] each. Ids outside the vocabulary count as unused.
    """
    used = (target.ids >= 0) & (target.ids < vocab.vocab_size)
    p = jnp.where(used, target.logp.astype(q_CV.dtype), -jnp.inf)
    column = jnp.where(used, target.ids - axis_index(vocab.axes) * vocab.size, -1)
    here = (column >= 0) & (column < vocab.size)
    q = vocab.sum(jnp.where(here, jnp.take_along_axis(q_CV, jnp.clip(column, 0, vocab.size - 1), axis=-1), 0))
    q = jnp.where(used, q, -jnp.inf)

    rows = jnp.arange(q_CV.shape[0])[:, None]
    at = jnp.where(here, column, vocab.size)  # of words elsewhere: dropped, where a negative index would count back

    def added(values_CV, values_CJ):
        """The values of the local columns with those of the words on top."""
        return values_CV.at[rows, at].add(jnp.where(used, values_CJ, 0), mode='drop')

    outside = jnp.ones(q_CV.shape, bool).at[rows, at].set(False, mode='drop')
    rest = vocab.sum(jnp.sum(jnp.where(outside, jnp.exp(q_CV), 0), axis=-1))
    tails = target.tail().astype(q_CV.dtype), jnp.log(jnp.maximum(rest, jnp.finfo(q_CV.dtype).tiny))
    if form == 'renormalized':
        p, q = (x - jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in (p, q))
    terms, slopes = (jnp.where(used, x, 0) for x in divergence(jnp.where(used, p, 0), jnp.where(used, q, 0)))
    value, slope = jnp.sum(terms, axis=-1), jnp.sum(slopes, axis=-1)
    if form == 'renormalized':
        return value, added(jnp.zeros_like(q_CV), slopes - jnp.exp(q) * slope[:, None]), tails
    if form == 'truncated':
        return value, added(-jnp.exp(q_CV) * slope[:, None], slopes), tails
    tail_term, tail_slope = divergence(*tails)
    share = jnp.where(outside, jnp.exp(q_CV - tails[1][:, None]), 0)
    others = tail_slope[:, None] * share - jnp.exp(q_CV) * (slope + tail_slope)[:, None]
    return value + tail_term, added(others, slopes), tails
