"""cuDNN's fused attention, through jax.nn.dot_product_attention, and the rule that says where it computes the same.

Its public interface knows no segments: rows may be cut short by a length, and that is all. A mask would be turned into
a bias of [T, S] in memory, which is what it is there to avoid. So it serves rows that the caller declares plain (one
segment per row from position 0, padding only behind it, keys and queries the same tokens); packed rows go blockwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.local import local, manual, platform
from jpt.kernels.parallel_attention import SEQUENCE, own_kv_heads, split

MAX_HEAD_DIM = 256


def refusal(q_BTNH, k_BSKH, v_BSKH, scores: Scores, sinks_N, plain_rows: bool) -> str | None:
    """Why cuDNN does not compute this attention here, or None where it does."""
    mask, head_dim = scores.mask, q_BTNH.shape[-1]
    reasons = {
        f'the platform is {platform()}, not gpu': platform() != 'gpu',
        f'the dtype is {q_BTNH.dtype}, not bfloat16 or float16': q_BTNH.dtype not in (jnp.bfloat16, jnp.float16),
        f'the head dimension {head_dim} is above {MAX_HEAD_DIM} or not a multiple of 8': head_dim > MAX_HEAD_DIM
        or head_dim % 8 != 0,
        'keys and values differ in head dimension': v_BSKH.shape[-1] != head_dim,
        'scores have a soft cap': scores.soft_cap is not None,
        'there are sinks': sinks_N is not None,
        'attention is chunked': mask.chunk is not None,
        'a window without a causal mask is not supported': mask.window is not None and not mask.causal,
        'the rows are not declared plain (one segment each)': not plain_rows or q_BTNH.shape[1] != k_BSKH.shape[1],
        'the sequence is cut over the context axis': bool(manual([SEQUENCE]) or split(q_BTNH, k_BSKH).sequence),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def cudnn_attention(q_BTNH, k_BTKH, v_BTKH, lengths_B, scores: Scores):
    """Attention over plain rows of the given lengths -> [B, T, N, H]; 0 behind the length of a row.

    q, k, v: bfloat16 or float16; lengths_B: int32, how many tokens of a row are real.
    """
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    layout = split(q_BTNH, k_BTKH)
    window = None if scores.mask.window is None else (scores.mask.window - 1, 0)

    def shard(q, k, v, lengths):
        """What one device computes: its rows and heads."""
        if layout.shared_kv:
            own = own_kv_heads(N, K)
            k, v = k[:, :, own], v[:, :, own]
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scores.scale,
            is_causal=scores.mask.causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=window,
            implementation='cudnn',
        )
        real = jnp.arange(q.shape[1])[None] < lengths[:, None]
        return jnp.where(real[..., None, None], out, 0)

    run = local(shard, (layout.q, layout.k, layout.k, P(layout.rows)), layout.q, layout.axes)
    return run(q_BTNH, k_BTKH, v_BTKH, lengths_B)
