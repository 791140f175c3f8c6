"""Attention of a few new tokens over the keys and values of a cache.

The cache holds keys as [B, K, H, S] and values as [B, K, S, H]: for both products the matrix then lies in memory as a
matrix product reads it, row by row, and nothing is transposed per token (four times faster on CPU than [B, S, K, H]).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpt.kernels.blockwise_attention import MASKED, Scores
from jpt.kernels.masks import Places, visible

# With this few queries the whole score array is small, and one pass beats a walk over blocks.
FEW_QUERIES = 16


def cached_attention(
    q_BTNH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    places: Places,
    rule: Scores,
    sinks_N: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of q [B, T, N, H] over a cache -> [B, T, N, H] in q's dtype; it writes [B, N, T, S] scores.

    Keys and values are taken in q's dtype, statistics in at least float32. Query head n reads kv head n // (N // K). A
    query that sees no key gives 0. `sinks_N`: a logit per head that joins the denominator only. Values, and with them
    the result, may have a width of their own. The formula is that of `dense_attention`, the reference.

    Where the cache holds codes, these are multiplied (E4M3 is exact in every dtype of q) and scores and outputs are
    scaled by `k_scale` and `v_scale`, [] each: no cache in another dtype is made. In fewer bits than float32 that is a
    little nearer to the numbers than rounding code * scale first.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    stats = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    scores = jnp.einsum('bkmh,bkhs->bkms', q_BKMH, k_BKHS.astype(q_BTNH.dtype), preferred_element_type=stats)
    factor = rule.scale if k_scale is None else rule.scale * k_scale.astype(stats)
    scores = scores.reshape(B, K, N // K, T, -1) * factor
    if rule.soft_cap is not None:
        scores = rule.soft_cap * jnp.tanh(scores / rule.soft_cap)
    seen = visible(places, rule.mask)[:, None, None]
    scores = jnp.where(seen, scores, MASKED)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    sinks = None if sinks_N is None else sinks_N.astype(stats).reshape(1, K, N // K, 1, 1)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks)
    weights = jnp.where(seen, jnp.exp(scores - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - peak)
    v_BKSH = v_BKSH if v_scale is None else v_BKSH.astype(q_BTNH.dtype)
    weights = weights.astype(v_BKSH.dtype).reshape(B, K, N // K * T, -1)
    out = jnp.einsum('bkms,bksh->bkmh', weights, v_BKSH, preferred_element_type=stats)
    out = out.reshape(B, K, N // K, T, -1) / jnp.where(total == 0, 1, total)
    out = out if v_scale is None else out * v_scale.astype(stats)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1).astype(q_BTNH.dtype)
