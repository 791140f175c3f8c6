"""Attention over packed segments: what a query may see, a dense reference, and the one function that picks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ('auto', 'blockwise', 'dense', 'cudnn')


def visible(q_positions, k_positions, q_segments, k_segments, *, causal, window, chunk):
    """Which key each query sees: bool [..., T, S] from int32 [..., T] and [..., S].

    A key is visible when its segment equals the query's and is not 0, and, where asked, when its position is not
    later (`causal`), less than `window` back, and in the same `chunk` of positions.
    """
    q_pos, k_pos = q_positions[..., :, None], k_positions[..., None, :]
    q_seg, k_seg = q_segments[..., :, None], k_segments[..., None, :]
    seen = (q_seg == k_seg) & (q_seg != 0)
    if causal:
        seen &= k_pos <= q_pos
    if window is not None:
        seen &= q_pos - k_pos < window
    if chunk is not None:
        seen &= q_pos // chunk == k_pos // chunk
    return seen


def dense_attention(q_BTNH, k_BSKH, v_BSKH, seen_BTS, *, soft_cap=None, scale, sinks_N=None):
    """Attention that writes the whole [B, N, T, S] score array: the reference the other implementations are held to."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    stats = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum('btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=stats) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = seen_BTS[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks = sinks_N.astype(stats).reshape(1, K, N // K, 1, 1)
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0) - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks_N is not None:
        total = total + jnp.exp(sinks - peak)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum('bkgts,bskh->btkgh', weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=stats)
    return out.reshape(B, T, N, v_BSKH.shape[-1]).astype(q_BTNH.dtype)


def attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    q_positions_BT,
    k_positions_BS,
    q_segments_BT,
    k_segments_BS,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float,
    sinks_N=None,
    chunk: int | None = None,
    implementation: str = 'auto',
):
    """Softmax attention of q [B, T, N, H] over k, v [B, S, K, H] -> [B, T, N, H] in q's dtype.

    Query head n reads kv head n // (N // K). Statistics are held in at least float32. A query that sees no key gives 0.

    Raises:
      ValueError: an unknown implementation, or query heads that are not a multiple of kv heads.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'attention: implementation={implementation!r}: expected one of {", ".join(IMPLEMENTATIONS)}')
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f'attention: {q_BTNH.shape[2]} query heads are not a multiple of {k_BSKH.shape[2]} kv heads')
    seen = visible(
        q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, causal=causal, window=window, chunk=chunk
    )
    return dense_attention(q_BTNH, k_BSKH, v_BSKH, seen, soft_cap=soft_cap, scale=scale, sinks_N=sinks_N)
