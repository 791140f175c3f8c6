"""Blockwise attention: online softmax forward, and a backward that recomputes scores from the log-sum-exp.

Rabe and Staats, Self-attention does not need O(n^2) memory (2021); Dao, FlashAttention-2 (2023), algorithms 1 and 2.
Queries are cut into tiles, each tile walks over the blocks of keys that some of its queries may see (found from the
data: positions and segments) and over no others. Nothing of size [T, S] is ever formed.

Here are the two directions on local arrays, without sinks, sharding or differentiation: attention.py puts those around.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.masks import Mask, Places, needed, visible

# A masked score. Finite, so that masked rows need no guard: exp(MASKED - anything real) is 0.
MASKED = -1e30


class Tile(NamedTuple):
    """How much one step works on: batch rows, queries (of every head) and keys."""

    rows: int
    queries: int
    keys: int


class Scores(NamedTuple):
    """How a score is made: mask, then `soft_cap * tanh(scale * q.k / soft_cap)` where a cap is given."""

    mask: Mask
    scale: float
    soft_cap: float | None = None


class _Plan(NamedTuple):
    """The walk: places cut into tiles, and for each tile the key blocks it visits."""

    places: Places  # [groups, q_blocks, rows, queries] and [groups, k_blocks, rows, keys]
    order: jax.Array  # [groups, q_blocks, k_blocks] the needed key blocks first
    length: jax.Array  # [groups, q_blocks] how many are needed


def _padded(x, axis: int, multiple: int):
    """x with zeros appended on `axis` up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x


def _cut(x_BT, rows: int, size: int):
    """[B, T] -> [groups, blocks, rows, size], padded with zeros."""
    x = _padded(_padded(x_BT, 0, rows), 1, size)
    return x.reshape(x.shape[0] // rows, rows, -1, size).swapaxes(1, 2)


def _cut_heads(x_BTNH, kv_heads: int, rows: int, size: int):
    """[B, T, N, H] -> [groups, blocks, rows, K, (N // K) * size, H]: the queries of one kv head lie together."""
    x = _padded(_padded(x_BTNH, 0, rows), 1, size)
    B, T, N, H = x.shape
    x = x.reshape(B // rows, rows, T // size, size, kv_heads, N // kv_heads, H)
    return x.transpose(0, 2, 1, 4, 5, 3, 6).reshape(B // rows, T // size, rows, kv_heads, -1, H)


def _cut_wide(x_BSKH, rows: int, size: int):
    """[B, S, K, H] -> [groups, blocks, rows, K, H, size]: a product over H takes a right operand that lies so in two
    thirds of the time on CPU."""
    return _cut_heads(x_BSKH, x_BSKH.shape[2], rows, size).swapaxes(-1, -2)


def _join_heads(x, shape):
    """The inverse of `_cut_heads`, cropped to [B, T, N, ...] = `shape`."""
    groups, blocks, rows, kv_heads = x.shape[:4]
    B, T, N, H = shape
    x = x.reshape(groups, blocks, rows, kv_heads, N // kv_heads, -1, H).transpose(0, 2, 1, 5, 3, 4, 6)
    return x.reshape(groups * rows, -1, N, H)[:B, :T]


def _plan(places: Places, mask: Mask, tile: Tile) -> _Plan:
    cut = Places(
        _cut(places.q_positions, tile.rows, tile.queries),
        _cut(places.k_positions, tile.rows, tile.keys),
        _cut(places.q_segments, tile.rows, tile.queries),
        _cut(places.k_segments, tile.rows, tile.keys),
    )
    need = needed(Places(*(x.swapaxes(1, 2) for x in cut)), mask).any(axis=1)
    return _Plan(cut, jnp.argsort(~need, axis=-1, stable=True), need.sum(axis=-1, dtype=jnp.int32))


def _dot(a, b, contract_a: int, contract_b: int, dtype):
    """Product of two [rows, K, ...] tiles over one axis of each, accumulated in `dtype`."""
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _scores(q, k, places: Places, scores: Scores, dtype):
    """Scores [rows, K, G * queries, keys] of one tile, masked, and the slope of the soft cap (None without one).

    q is [rows, K, G * queries, H], k [rows, K, H, keys].
    """
    s = _dot(q, k, 3, 2, dtype) * scores.scale
    slope = None
    if scores.soft_cap is not None:
        capped = jnp.tanh(s / scores.soft_cap)
        s, slope = scores.soft_cap * capped, 1 - capped * capped
    seen = visible(places, scores.mask)[:, None, None]
    rows, kv_heads, _, keys = s.shape
    s = s.reshape(rows, kv_heads, -1, seen.shape[-2], keys)
    return jnp.where(seen, s, MASKED).reshape(rows, kv_heads, -1, keys), slope


def forward(q_BTNH, k_BSKH, v_BSKH, places: Places, scores: Scores, tile: Tile):
    """Attention and its log-sum-exp: out [B, T, N, Hv] and lse [B, T, N], both in at least float32.

    A query that sees no key gives 0, with a log-sum-exp of about `MASKED`.
    """
    stats = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    B, T, N, _ = q_BTNH.shape
    kv_heads, width = v_BSKH.shape[2:]
    plan = _plan(places, scores.mask, tile)
    q_tiles = _cut_heads(q_BTNH, kv_heads, tile.rows, tile.queries)
    k_tiles = _cut_wide(k_BSKH, tile.rows, tile.keys)
    v_tiles = _cut_heads(v_BSKH, kv_heads, tile.rows, tile.keys)
    groups, q_blocks = plan.length.shape

    def one_tile(step):
        """(out, lse) of one tile of queries, which walks over the key blocks that it needs."""
        group, block = step // q_blocks, step % q_blocks
        q = q_tiles[group, block]
        q_places = plan.places.q_positions[group, block], plan.places.q_segments[group, block]

        def visit(index, state):
            peak, total, out = state
            j = plan.order[group, block, index]
            here = Places(q_places[0], plan.places.k_positions[group, j], q_places[1], plan.places.k_segments[group, j])
            s, _ = _scores(q, k_tiles[group, j], here, scores, stats)
            new_peak = jnp.maximum(peak, s.max(axis=-1))
            p = jnp.exp(s - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            v = v_tiles[group, j]
            out = out * decay[..., None] + _dot(p.astype(v.dtype), v, 3, 2, stats)
            return new_peak, total * decay + p.sum(axis=-1), out

        nothing = jnp.full(q.shape[:3], MASKED, stats)
        start = nothing, jnp.zeros_like(nothing), jnp.zeros((*q.shape[:3], width), stats)
        peak, total, out = lax.fori_loop(0, plan.length[group, block], visit, start)
        empty = peak <= MASKED / 2
        total = jnp.where(empty, 1, total)
        return jnp.where(empty[..., None], 0, out / total[..., None]), peak + jnp.log(total)

    out, lse = lax.map(one_tile, jnp.arange(groups * q_blocks))
    split = (groups, q_blocks, tile.rows, kv_heads, -1)
    out = _join_heads(out.reshape(*split, width), (B, T, N, width))
    return out, _join_heads(lse.reshape(*split, 1), (B, T, N, 1))[..., 0]


def backward(q_BTNH, k_BSKH, v_BSKH, places: Places, lse_BTN, delta_BTN, dout_BTNH, scores: Scores, tile: Tile):
    """Gradients (dq, dk, dv) of the part of attention whose keys are given, in at least float32.

    `lse_BTN` is the log-sum-exp over *all* keys a query sees (elsewhere too, sinks included) and `delta_BTN` the sum
    over the head of out * dout: with these the parts of a row can be worked on apart, in any order.
    """
    stats = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    kv_heads = k_BSKH.shape[2]
    plan = _plan(places, scores.mask, tile)
    # A query without a visible key has lse = MASKED; its masked scores must not come out as exp(0).
    lse_BTN = jnp.where(lse_BTN <= MASKED / 2, -MASKED, lse_BTN)
    q_tiles = _cut_heads(q_BTNH, kv_heads, tile.rows, tile.queries)
    k_tiles = _cut_wide(k_BSKH, tile.rows, tile.keys)
    v_tiles = _cut_wide(v_BSKH, tile.rows, tile.keys)
    dout_tiles = _cut_heads(dout_BTNH, kv_heads, tile.rows, tile.queries)
    lse_tiles = _cut_heads(lse_BTN[..., None], kv_heads, tile.rows, tile.queries)
    delta_tiles = _cut_heads(delta_BTN[..., None], kv_heads, tile.rows, tile.queries)
    groups, q_blocks = plan.length.shape

    def one_tile(carry, step):
        """Adds one tile of queries to dk and dv, and gives its dq."""
        group, block = step // q_blocks, step % q_blocks
        q, dout = q_tiles[group, block], dout_tiles[group, block]
        lse, delta = lse_tiles[group, block], delta_tiles[group, block]
        q_places = plan.places.q_positions[group, block], plan.places.q_segments[group, block]

        def visit(index, state):
            """One block of keys: its scores again, and what they add to the three gradients."""
            dq, dk, dv = state
            j = plan.order[group, block, index]
            here = Places(q_places[0], plan.places.k_positions[group, j], q_places[1], plan.places.k_segments[group, j])
            k, v = k_tiles[group, j], v_tiles[group, j]
            s, slope = _scores(q, k, here, scores, stats)
            p = jnp.exp(s - lse)
            ds = p * (_dot(dout, v, 3, 2, stats) - delta) * scores.scale
            ds = (ds if slope is None else ds * slope).astype(q.dtype)
            # Transposed (width first): XLA's CPU dot would copy the large left operand otherwise.
            dk = dk.at[group, j].add(_dot(q, ds, 2, 2, stats))
            dv = dv.at[group, j].add(_dot(dout, p.astype(dout.dtype), 2, 2, stats))
            return dq + _dot(ds, k, 3, 3, stats), dk, dv

        dq, dk, dv = lax.fori_loop(0, plan.length[group, block], visit, (jnp.zeros(q.shape, stats), *carry))
        return (dk, dv), dq

    start = jnp.zeros_like(k_tiles, stats), jnp.zeros_like(v_tiles, stats)
    (dk, dv), dq = lax.scan(one_tile, start, jnp.arange(groups * q_blocks))
    dq = _join_heads(dq.reshape(q_tiles.shape), q_BTNH.shape)
    return dq, _join_heads(dk.swapaxes(-1, -2), k_BSKH.shape), _join_heads(dv.swapaxes(-1, -2), v_BSKH.shape)
