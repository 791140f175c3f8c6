"""A teacher's likeliest words from its hidden states and head: logits exist for one chunk of tokens at a time.

The vocabulary may be cut over mesh axes. Then every shard finds its own likeliest words, the shards show each other
those few, and the likeliest of them are the likeliest of all; of the rest only sums travel.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.head_chunks import capped_logits, check_vocabulary, choose_chunk, chunked, flat, layout_of
from jpt.kernels.local import axis_index, local, manual, pmax
from jpt.kernels.sparse_target import SparseTarget
from jpt.kernels.vocab import VOCAB
from jpt.kernels.vocab_shard import VocabShard


class Likely(NamedTuple):
    """The target of every token, and the log-probability of the word that came next, at the same temperature."""

    target: SparseTarget  # [N, J]; ids in the order of their probability, log_tail [N] exact
    sampled_logp: jax.Array  # [N]


class _Rule(NamedTuple):
    """What is fixed when the program is traced."""

    words: int
    top_p: float | None
    at_least: int
    temperature: float


def likely_words(
    hidden,
    kernel_VD,
    next_ids,
    *,
    count: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    at_least: int = 1,
    soft_cap: float | None = None,
    chunk: int | None = None,
    vocab_axes: tuple[str, ...] = VOCAB,
) -> Likely:
    """The `count` likeliest words of softmax(logits / temperature), logits = hidden @ kernel^T; not differentiable.

    Log-probabilities are those in the whole vocabulary, and the mass of the words left out is a sum over these words:
    what 1 leaves of rounded probabilities would not have its digits. All are in at least float32. Of equal words the
    one with the smaller id comes first.

    Args:
      hidden: [N, D] or [B, T, D]; results have the same leading axes.
      kernel_VD: [V, D]; V may be padded above `vocab_size`, and padded columns are never taken.
      next_ids: int32 [N] or [B, T], the words that came.
      top_p: keep the fewest words that hold this mass, but `at_least` so many and at most `count`; the ids of the
        others are -1 and their log-probabilities -inf. None keeps all.
      soft_cap, chunk, vocab_axes: as `linear_loss` takes them.

    Raises:
      ValueError: a count that is not from 1 to `vocab_size`, or a vocabulary as in `linear_loss`.
    """
    check_vocabulary('likely_words', kernel_VD.shape[0], vocab_size, vocab_axes)
    if not 1 <= count <= vocab_size:
        raise ValueError(f'likely_words: count={count}: expected 1 to {vocab_size}, the size of the vocabulary')
    rule = _Rule(count, top_p, at_least, temperature)
    stats = jnp.promote_types(hidden.dtype, jnp.float32)
    layout = layout_of(tuple(vocab_axes), hidden)

    def shard(hidden, kernel, next_ids):
        """The words of the local tokens, over all shards of the vocabulary."""
        leading, tokens = next_ids.shape, next_ids.size
        vocab = VocabShard(tuple(vocab_axes), kernel.shape[0], vocab_size)
        size = min(chunk or choose_chunk(tokens, kernel.shape[0]), tokens)
        kernel = kernel.astype(hidden.dtype)

        def step(one) -> Likely:
            h_CD, next_C = one
            logits_CV, _ = capped_logits(h_CD, kernel, vocab, soft_cap, stats)
            return _of_chunk(rule, logits_CV, next_C, vocab)

        found = lax.map(step, jax.tree.map(partial(chunked, size), flat((hidden, next_ids), len(leading))))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens].reshape(*leading, *x.shape[2:]), found)

    return local(shard, (layout.tokens, layout.kernel, layout.tokens), layout.tokens, layout.axes)(
        hidden, kernel_VD, next_ids
    )


def _of_chunk(rule: _Rule, logits_CV, next_C, vocab: VocabShard) -> Likely:
    peak = vocab.max(logits_CV) / rule.temperature
    cooled_CV = logits_CV / rule.temperature
    lse = vocab.log_normalizer(cooled_CV, peak)
    values_CJ, ids_CJ = top_words(rule.words, cooled_CV, vocab)
    logp_CJ = values_CJ - lse[:, None]
    if rule.top_p is not None:
        mass_before = jnp.cumsum(jnp.exp(logp_CJ), axis=-1) - jnp.exp(logp_CJ)
        kept = (mass_before < rule.top_p) | (jnp.arange(rule.words) < rule.at_least)[None]
        logp_CJ, ids_CJ = jnp.where(kept, logp_CJ, -jnp.inf), jnp.where(kept, ids_CJ, -1)
    log_tail = _log_sum_of_others(cooled_CV, ids_CJ, vocab) - lse
    sampled = vocab.sum(vocab.pick(cooled_CV, next_C)) - lse
    return Likely(SparseTarget(ids_CJ, logp_CJ, log_tail), sampled)


def top_words(count: int, cooled_CV, vocab: VocabShard):
    """(values, ids) [C, count] of the largest over all shards, in order, or all that there are."""
    values, columns = largest(cooled_CV, min(count, vocab.size))
    ids = columns.astype(jnp.int32) + axis_index(vocab.axes) * vocab.size
    names = manual(vocab.axes)
    if names:
        values, ids = (lax.all_gather(x, names, axis=1, tiled=True) for x in (values, ids))
        values, best = lax.top_k(values, count)
        ids = jnp.take_along_axis(ids, best, axis=1)
    return values, ids


def largest(x_CV, count: int):
    """`lax.top_k` along a long axis, by blocks: exact, of equal numbers the first.

    The `count` largest numbers lie in those blocks that have the `count` largest maxima. With blocks of about
    sqrt(V / count) only 2 sqrt(V count) numbers are sorted, where a GPU sorts all V of them for a top-k, and holds a
    copy. Where that is not an eighth of V, or V has no divisor near that, all are.
    """
    length = x_CV.shape[-1]
    block = near_divisor(length, math.sqrt(length / count))
    if block == 1 or length // block < count or length // block + count * block > length / 8:
        return lax.top_k(x_CV, count)
    blocks = x_CV.reshape(*x_CV.shape[:-1], length // block, block)
    _, chosen = lax.top_k(jnp.max(blocks, axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # of equal numbers the first is to stay the first
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
    values, at = lax.top_k(candidates.reshape(*x_CV.shape[:-1], count * block), count)
    return values, jnp.take_along_axis(chosen, at // block, axis=-1) * block + at % block


def near_divisor(length: int, wanted: float) -> int:
    """The divisor of a length that is nearest to what is wanted, by ratio; 1 where none is within a factor of 4."""
    near = [d for d in range(2, int(4 * wanted) + 1) if length % d == 0 and wanted <= 4 * d]
    return min(near, key=lambda d: abs(math.log(d / wanted)), default=1)


def _log_sum_of_others(cooled_CV, ids_CJ, vocab: VocabShard):
    """log sum exp over the words that are not among ids, [C]; -inf where there are none."""
    column = ids_CJ - axis_index(vocab.axes) * vocab.size
    here = (ids_CJ >= 0) & (column >= 0) & (column < vocab.size)
    rows = jnp.arange(cooled_CV.shape[0])[:, None]
    # Columns that are elsewhere are dropped, where a negative index would count back.
    others = vocab.mask(cooled_CV, -jnp.inf).at[rows, jnp.where(here, column, vocab.size)].set(-jnp.inf, mode='drop')
    peak = pmax(jnp.max(others, axis=-1), vocab.axes)
    finite = jnp.where(jnp.isfinite(peak), peak, 0)
    mass = vocab.sum(jnp.sum(jnp.exp(others - finite[:, None]), axis=-1))
    return finite + jnp.log(mass)
