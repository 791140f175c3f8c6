"""Tokens against the vocabulary, a chunk at a time: how operands lie on a mesh, and the logits of one chunk.

What is computed from them is in head_loss.py (losses, with gradients) and likely_words.py (the likeliest words).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size, axis_size, platform
from jpt.kernels.parallel_attention import ROWS, SEQUENCE
from jpt.kernels.vocab_shard import VocabShard


def check_vocabulary(caller: str, rows: int, vocab_size: int, vocab_axes: tuple[str, ...]) -> None:
    """Raises ValueError where a kernel of so many rows does not divide over the axes or has too few of them."""
    if rows % auto_size(vocab_axes):
        sizes = ' x '.join(f'{name}={auto_size([name])}' for name in vocab_axes)
        raise ValueError(f'{caller}: a vocabulary of {rows} rows does not divide over {sizes}: pad it')
    if rows * axis_size(vocab_axes) < vocab_size:
        raise ValueError(
            f'{caller}: vocab_size={vocab_size}: the kernel has {rows * axis_size(vocab_axes)} rows in all'
        )


def choose_chunk(tokens: int, vocab: int) -> int:
    """Tokens per step, measured by benchmarks/head_loss.py.

    A small chunk keeps logits in cache (CPU) or memory low (GPU); a large one reads the kernel fewer times. The logits
    of a chunk take 8 MiB on CPU and 128 MiB on GPU.
    """
    budget = (8 if platform() == 'cpu' else 128) * 2**20 // 4
    chunk = max(128, 2 ** int(math.log2(max(budget // vocab, 1))))
    return min(chunk, tokens)


class Layout(NamedTuple):
    """How operands are split over the automatic axes: specs and the axes that tokens and columns go over."""

    tokens: P
    kernel: P  # and every other table [V, ...]
    dkernel: P
    token_axes: tuple[str, ...]
    vocab_axes: tuple[str, ...]
    scatter: str | None  # the axis over which the kernel's gradient comes out cut by width

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.token_axes, *self.vocab_axes)


def layout_of(vocab_axes: tuple[str, ...], hidden) -> Layout:
    """The layout of hidden states [N, D] or [B, T, D] and of a kernel [V, D], over axes that divide them."""
    rows = auto(ROWS) if hidden.shape[0] % auto_size(ROWS) == 0 else ()
    sequence = auto([SEQUENCE]) if hidden.ndim == 3 and hidden.shape[1] % auto_size([SEQUENCE]) == 0 else ()
    vocab = auto(vocab_axes)
    # Parameters lie cut over fsdp: sum straight into that layout (half of what an all-reduce moves).
    scatter = 'fsdp' if 'fsdp' in rows and hidden.shape[-1] % auto_size(['fsdp']) == 0 else None
    return Layout(
        tokens=P(rows, sequence) if hidden.ndim == 3 else P(rows),
        kernel=P(vocab),
        dkernel=P(vocab, scatter),
        token_axes=(*rows, *sequence),
        vocab_axes=vocab,
        scatter=scatter,
    )


def flat(tree, leading: int):
    """Every leaf with its first `leading` axes made one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[leading:]), tree)


def chunked(chunk: int, x):
    """[N, ...] -> [parts, chunk, ...], padded with zeros (so with weight 0)."""
    missing = -x.shape[0] % chunk
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def capped_logits(h_CD, kernel_VD, vocab: VocabShard, soft_cap: float | None, stats, bias_V=None):
    """Logits [C, V] of the local columns, padding masked, and the slope of the soft cap (None without one)."""
    logits = lax.dot_general(h_CD, kernel_VD, (((1,), (1,)), ((), ())), preferred_element_type=stats)
    if bias_V is not None:
        logits += bias_V.astype(stats)[None]
    slope = None
    if soft_cap is not None:
        capped = jnp.tanh(logits / soft_cap)
        logits, slope = soft_cap * capped, 1 - capped * capped
    return vocab.mask(logits), slope
