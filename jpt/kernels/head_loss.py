"""The last linear layer and the loss on its logits, in one: logits exist for one chunk of tokens at a time.

A scan over chunks computes the logits, the loss and, when the result is differentiated, both gradients at once (the
scheme of Liger Kernel: Hsu et al. 2024): 6 N D V operations, no logits but a chunk's, no softmax kept. On a GPU the
logits' gradients of several chunks, a block, wait in the dtype of the hidden states for one product with them: adding
to the kernel's gradient chunk by chunk would move more bytes than the products take time. The vocabulary may be cut
over mesh axes: then only per-token scalars and, once after the scan, gradients are summed over shards. What is computed
from a chunk of logits is a token loss (token_losses.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jpt.kernels.head_chunks import capped_logits, check_vocabulary, choose_chunk, chunked, flat, layout_of
from jpt.kernels.local import axis_size, local, platform, psum
from jpt.kernels.token_losses import TokenLoss
from jpt.kernels.vocab import VOCAB
from jpt.kernels.vocab_shard import VocabShard


class _Rule(NamedTuple):
    """What is fixed when the program is traced."""

    token_loss: TokenLoss
    vocab_size: int
    soft_cap: float | None
    chunk: int | None
    block: int | None
    vocab_axes: tuple[str, ...]


class _Head(NamedTuple):
    """What makes logits, or the gradients of it; without a bias there is None."""

    kernel: Any  # [V, D]
    bias: Any = None  # [V]


def linear_loss(
    hidden,
    kernel_VD,
    weights,
    args,
    token_loss: TokenLoss,
    *,
    vocab_size: int,
    bias_V=None,
    shared=None,
    soft_cap: float | None = None,
    chunk: int | None = None,
    block: int | None = None,
    vocab_axes: tuple[str, ...] = VOCAB,
):
    """Weighted sum over tokens of a loss on logits = hidden @ kernel^T + bias -> (total, {name: (sum, weight)}).

    Differentiable in hidden, kernel and bias. Products are made in hidden's dtype; logits, statistics and the gradients
    of kernel and bias are held in at least float32. Padded columns of the vocabulary never count.

    Args:
      hidden: [N, D] or [B, T, D].
      kernel_VD: [V, D], any float dtype; the gradient has the same. V may be padded above `vocab_size`.
      weights: [N] or [B, T], at least float32; already divided by the global count. All zeros give 0 and no gradient.
      args: pytree of [N, ...] or [B, T, ...] that the token loss reads (targets, a teacher's hidden states, ...).
      token_loss: see token_losses.py; hashable.
      bias_V: [V], padded and cut as the kernel, or None. It is added before the soft cap.
      shared: pytree of tables [V, ...] that the token loss reads, cut over the vocabulary as the kernel (a teacher's
        head and its bias), or None. Not differentiated, nor are args.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      chunk: tokens per step of the scan; None picks by platform. The result does not depend on it but by rounding.
      block: chunks whose logits' gradients wait for one product; None picks by platform, see `choose_block`.
      vocab_axes: mesh axes over which the vocabulary is cut. Where an outer shard_map holds one of them manual, kernel
        and shared are this shard's rows already and hidden is the same on all of them.

    Returns:
      total: scalar; every metric of the token loss as (weighted sum, sum of weights). Over axes that are manual outside
      (data, context) these and the kernel's gradient are this shard's part, to be summed there.

    Raises:
      ValueError: a vocabulary that does not divide over its axes or is smaller than `vocab_size`, or a bias of another
      size.
    """
    if bias_V is not None and bias_V.shape != kernel_VD.shape[:1]:
        raise ValueError(f'linear_loss: bias_V.shape={bias_V.shape}: expected {kernel_VD.shape[:1]}, as the kernel has')
    check_vocabulary('linear_loss', kernel_VD.shape[0], vocab_size, vocab_axes)
    rule = _Rule(token_loss, vocab_size, soft_cap, chunk, block, tuple(vocab_axes))
    return _linear_loss(rule, hidden, _Head(kernel_VD, bias_V), weights, args, shared)


def choose_block(tokens: int, chunk: int, width: int, itemsize: int, *, wide: bool) -> int:
    """Chunks whose logits' gradients, `itemsize` bytes each, wait for one product.

    Adding a block to the kernel's gradient in float32 moves 8 D V bytes, all products of a block of n tokens take
    6 n D V operations: an H100 (600 Tflop/s, 3.35 TB/s) spends 240 / n as long on the sums as on the products. All
    tokens in one block need no float32 sum, so they are one where that takes no more room than the sum; not where a
    float32 gradient is asked for (`wide`). Else a block takes a sixteenth of the sum's room, n = D / 8.
    On CPU chunks stay in cache, and a block is one chunk.
    """
    if platform() == 'cpu':
        return 1
    equal = 4 * width // itemsize  # tokens whose gradients take as many bytes as the float32 sum
    most = max(1, (equal if tokens <= equal and not wide else equal // 16) // chunk)
    chunks = -(-tokens // chunk)
    return -(-chunks // -(-chunks // most))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_loss(rule: _Rule, hidden, head: _Head, weights, args, shared):
    layout = layout_of(rule.vocab_axes, hidden)

    def shard(hidden, head, weights, args, shared):
        total, sums, *_ = _scan(rule, hidden, head, weights, args, shared)
        return psum((total, sums), layout.token_axes)

    specs = (layout.tokens, layout.kernel, layout.tokens, layout.tokens, layout.kernel)
    return local(shard, specs, P(), layout.axes)(hidden, head, weights, args, shared)


def _linear_loss_fwd(rule: _Rule, hidden, head: _Head, weights, args, shared):
    layout = layout_of(rule.vocab_axes, hidden)

    def shard(hidden, head, weights, args, shared):
        stats = jnp.promote_types(hidden.dtype, jnp.float32)
        dtype = stats if layout.token_axes else head.kernel.dtype
        total, sums, dhidden, (dkernel, dbias) = _scan(rule, hidden, head, weights, args, shared, dtype=dtype)
        if layout.scatter:
            dkernel = lax.psum_scatter(dkernel, layout.scatter, scatter_dimension=1, tiled=True)
        others = tuple(name for name in layout.token_axes if name != layout.scatter)
        dkernel = psum(dkernel, others).astype(head.kernel.dtype)
        if head.bias is not None:
            dbias = psum(dbias, layout.token_axes).astype(head.bias.dtype)
        dhidden = psum(dhidden, rule.vocab_axes).astype(hidden.dtype)
        return psum((total, sums), layout.token_axes), (dhidden, _Head(dkernel, dbias))

    specs = (layout.tokens, layout.kernel, layout.tokens, layout.tokens, layout.kernel)
    dhead = _Head(layout.dkernel, None if head.bias is None else layout.kernel)
    run = local(shard, specs, (P(), (layout.tokens, dhead)), layout.axes)
    return run(hidden, head, weights, args, shared)


def _linear_loss_bwd(rule: _Rule, gradients, cotangents):
    del rule
    slope, _ = cotangents
    dhidden, dhead = jax.tree.map(lambda x: (x.astype(slope.dtype) * slope).astype(x.dtype), gradients)
    return dhidden, dhead, None, None, None


_linear_loss.defvjp(_linear_loss_fwd, _linear_loss_bwd)


def _scan(rule: _Rule, hidden, head: _Head, weights, args, shared, *, dtype=None):
    """(total, sums, dhidden, dhead) of the local tokens over the local columns, gradients not yet summed.

    dtype: of dkernel; without one there are no gradients.
    """
    kernel_VD, bias_V = head
    shape, width = hidden.shape, hidden.shape[-1]
    stats = jnp.promote_types(hidden.dtype, jnp.float32)
    tree = flat((hidden, weights.astype(stats), args), weights.ndim)
    tokens = tree[1].shape[0]
    chunk = min(rule.chunk or choose_chunk(tokens, kernel_VD.shape[0]), tokens)
    chunks = jax.tree.map(partial(chunked, chunk), tree)
    with_gradients = dtype is not None
    step = _step(rule, _Head(kernel_VD.astype(hidden.dtype), bias_V), shared, stats, with_gradients=with_gradients)
    zero = jnp.zeros((), stats)
    dbias = jnp.zeros(bias_V.shape, stats) if with_gradients and bias_V is not None else None
    start = zero, dict.fromkeys(rule.token_loss.metrics, zero), dbias
    if not with_gradients:
        total, sums, _ = lax.scan(step, start, chunks)[0]
        return total, _averages(sums, tree[1]), None, _Head(None)

    block = rule.block or choose_block(tokens, chunk, width, hidden.dtype.itemsize, wide=jnp.dtype(dtype) == stats)
    blocks = jax.tree.map(partial(chunked, block), chunks)

    def add_block(before, chunks, dtype=stats):
        """A block: its chunks one after the other, and its part of the kernel's gradient."""
        after, (dlogits, dh) = lax.scan(step, before, chunks)
        # A token without weight may hold anything: 0 times a NaN would spoil the kernel's gradient.
        dlogits_NV, h_ND = flat((dlogits, jnp.where((chunks[1] != 0)[..., None], chunks[0], 0)), 2)
        dkernel = lax.dot_general(dlogits_NV, h_ND, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return after, dkernel, dh

    def add_on(carry, chunks):
        """The next block, added to those before."""
        after, more, dh = add_block(carry[0], chunks)
        return (after, carry[1] + more), dh

    if blocks[1].shape[0] == 1:
        (total, sums, dbias), dkernel, dh = add_block(start, jax.tree.map(lambda x: x[0], blocks), dtype)
    else:
        begin = start, jnp.zeros((kernel_VD.shape[0], width), stats)
        ((total, sums, dbias), dkernel), dh = lax.scan(add_on, begin, blocks)
    return total, _averages(sums, tree[1]), dh.reshape(-1, width)[:tokens].reshape(shape), _Head(dkernel, dbias)


def _step(rule: _Rule, head: _Head, shared, stats, *, with_gradients: bool):
    """What is done with one chunk of tokens, as `lax.scan` calls it."""
    kernel_VD, bias_V = head
    vocab = VocabShard(rule.vocab_axes, kernel_VD.shape[0], rule.vocab_size)
    # One shard's part of dhidden is rounded to hidden's dtype only after the parts are added.
    part = stats if axis_size(rule.vocab_axes) > 1 else kernel_VD.dtype

    def step(carry, one):
        """One chunk of tokens: its logits, loss and metrics, and the gradients of logits and hidden states."""
        total, sums, dbias = carry
        h_CD, weight_C, args_C = one
        logits_CV, slope = capped_logits(h_CD, kernel_VD, vocab, rule.soft_cap, stats, bias_V)
        loss_C, dlogits_CV, metrics = rule.token_loss(logits_CV, args_C, shared, vocab)
        used = weight_C != 0
        weigh = partial(_weighted_sum, weight_C, used)
        total, sums = total + weigh(loss_C), {name: sums[name] + weigh(value) for name, value in metrics.items()}
        if not with_gradients:
            return (total, sums, dbias), None
        factor = weight_C[:, None] if slope is None else weight_C[:, None] * slope
        dlogits = jnp.where(used[:, None], dlogits_CV * factor, 0)
        if dbias is not None:
            dbias += jnp.sum(dlogits, axis=0)
        dlogits = dlogits.astype(h_CD.dtype)
        dh = lax.dot_general(dlogits, kernel_VD, (((1,), (0,)), ((), ())), preferred_element_type=stats)
        return (total, sums, dbias), (dlogits, dh.astype(part))

    return step


def _averages(sums, weights_N):
    """Every metric's weighted sum beside the sum of weights."""
    return {name: (value, jnp.sum(weights_N)) for name, value in sums.items()}


def _weighted_sum(weight_C, used_C, value_C):
    return jnp.sum(jnp.where(used_C, weight_C * value_C, 0))
