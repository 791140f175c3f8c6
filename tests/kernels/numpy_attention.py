"""Attention and its gradients in float64 numpy, element by element from the definitions: the yardstick."""

import numpy as np


def packed_places(rng, rows, length, segments, padding=0):
    """Positions and segments [rows, length] of packed rows: up to `segments` documents, then `padding` empty slots."""
    positions, segment_ids = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.integers(1, length - padding, segments - 1))
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, length - padding], strict=True), 1):
            positions[row, start:stop] = np.arange(stop - start)
            segment_ids[row, start:stop] = number
    return positions, segment_ids


def seen(places, causal=True, window=None, chunk=None):
    """bool [B, T, S] from (q_positions, k_positions, q_segments, k_segments)."""
    q_pos, k_pos, q_seg, k_seg = (np.asarray(x, np.int64) for x in places)
    q_pos, q_seg, k_pos, k_seg = q_pos[:, :, None], q_seg[:, :, None], k_pos[:, None], k_seg[:, None]
    result = (q_seg == k_seg) & (q_seg != 0)
    if causal:
        result &= k_pos <= q_pos
    if window is not None:
        result &= k_pos > q_pos - window
    if chunk is not None:
        result &= q_pos // chunk == k_pos // chunk
    return result


def attention_and_gradients(q, k, v, dout, places, scale, soft_cap=None, sinks=None, **mask):
    """out [B, T, N, Hv] and the gradients (dq, dk, dv, dsinks) of sum(out * dout), all float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    B, _, N, _ = q.shape
    group = N // k.shape[2]
    visible = seen(places, **mask)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    dq, dk, dv, dsinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(N)
    for b in range(B):
        for n in range(N):
            kv = n // group
            raw = q[b, :, n] @ k[b, :, kv].T * scale
            capped = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
            slope = 1 if soft_cap is None else 1 - (capped / soft_cap) ** 2
            weights = np.where(visible[b], np.exp(capped), 0)
            sink = 0 if sinks is None else np.exp(float(sinks[n]))
            total = weights.sum(axis=1, keepdims=True) + sink
            p = weights / np.where(total == 0, 1, total)
            out[b, :, n] = p @ v[b, :, kv]
            do = dout[b, :, n]
            dp = do @ v[b, :, kv].T
            mean = (p * dp).sum(axis=1, keepdims=True)
            ds = p * (dp - mean) * slope * scale
            dv[b, :, kv] += p.T @ do
            dq[b, :, n] = ds @ k[b, :, kv]
            dk[b, :, kv] += ds.T @ q[b, :, n]
            share = np.divide(sink, total, out=np.zeros_like(total), where=total != 0)
            dsinks[n] -= (share * mean).sum()
    return out, (dq, dk, dv, dsinks)
