"""Attention over packed segments: a dense reference, and the one function that picks an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.cached_attention import FEW_QUERIES
from jpt.kernels.context_attention import CONTEXTS
from jpt.kernels.cudnn_attention import cudnn_attention, refusal
from jpt.kernels.local import manual
from jpt.kernels.masks import Mask, Places, visible
from jpt.kernels.parallel_attention import SEQUENCE, Options, parallel_attention

IMPLEMENTATIONS = ('auto', 'blockwise', 'dense', 'cudnn')


def dense_attention(q_BTNH, k_BSKH, v_BSKH, places: Places, rule: Scores, sinks_N=None):
    """Attention that writes the whole [B, N, T, S] score array: the reference the other implementations are held to."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    stats = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum('btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=stats) * rule.scale
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    seen = visible(places, rule.mask)[:, None, None]
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
    context: str = 'ring',
    plain_rows: bool = False,
):
    """Softmax attention of q [B, T, N, H] over k [B, S, K, H] and v [B, S, K, Hv] -> [B, T, N, Hv] in q's dtype.

    A key is visible when its segment equals the query's and is not 0, and, where asked, when its position is not later
    (`causal`), less than `window` back, in the same run of `chunk` positions. A query that sees no key gives 0.
    Query head n reads kv head n // (N // K). Statistics are held in at least float32.

    Args:
      q_positions_BT, k_positions_BS: int32; they restart in every segment. q_segments_BT, k_segments_BS: int32, 0 for
        padding and unused cache slots.
      soft_cap: scores become `soft_cap * tanh(scale * q.k / soft_cap)`.
      sinks_N: one logit per query head that joins the denominator only (gpt-oss).
      implementation: 'blockwise' (ours, any mesh), 'dense' (the reference, [B, N, T, S] in memory), 'cudnn', or 'auto':
        dense for a few queries (decoding), cuDNN where it computes the same (see cudnn_attention.py), else blockwise.
      context: how keys travel where the sequence is cut over the mesh axis `context`: 'ring' or 'gather'.
      plain_rows: the caller's word that every row is one segment from position 0 on, with padding only behind it, and
        that keys and queries are the same tokens. It is what cuDNN needs; the others do not look at it.

    Raises:
      ValueError: an unknown name, heads that do not divide, or an implementation that cannot compute this here.
    """
    _check(q_BTNH, k_BSKH, implementation, context)
    scores = Scores(Mask(causal, window, chunk), scale, soft_cap)
    places = Places(q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS)
    refused = None
    if implementation in ('auto', 'cudnn'):
        refused = refusal(q_BTNH, k_BSKH, v_BSKH, scores, sinks_N, plain_rows)
        if implementation == 'cudnn' and refused:
            raise ValueError(f"attention: implementation='cudnn' cannot be used: {refused}")
    whole = not manual([SEQUENCE])
    if implementation == 'dense' and not whole:
        raise ValueError("attention: implementation='dense' under a manual context axis: expected blockwise or auto")
    few = q_BTNH.shape[1] <= FEW_QUERIES and whole
    if implementation == 'dense' or (implementation == 'auto' and few):
        return dense_attention(q_BTNH, k_BSKH, v_BSKH, places, scores, sinks_N)
    if implementation in ('auto', 'cudnn') and refused is None:
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, jnp.sum(q_segments_BT != 0, axis=1, dtype=jnp.int32), scores)
    return parallel_attention(Options(scores, context), q_BTNH, k_BSKH, v_BSKH, sinks_N, places)


def _check(q_BTNH, k_BSKH, implementation: str, context: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'attention: implementation={implementation!r}: expected one of {", ".join(IMPLEMENTATIONS)}')
    if context not in CONTEXTS:
        raise ValueError(f'attention: context={context!r}: expected one of {", ".join(CONTEXTS)}')
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f'attention: {q_BTNH.shape[2]} query heads are not a multiple of {k_BSKH.shape[2]} kv heads')
