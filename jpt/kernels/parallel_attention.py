"""Differentiable blockwise attention on any mesh: rows over data, heads over `tensor`, the sequence over `context`.

One custom_vjp around two nested shard_maps, so that nothing is differentiated through a collective. Under axes that an
outer shard_map has made manual the operands are local already: the gradients returned are then this shard's own part,
to be summed where the outer code sums gradients.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jpt.kernels import blockwise_attention as blockwise
from jpt.kernels import context_attention as context
from jpt.kernels.blockwise_attention import Scores, Tile
from jpt.kernels.local import auto, auto_size, axis_index, axis_size, local, manual, platform, psum
from jpt.kernels.masks import Places

ROWS, HEADS, SEQUENCE = ('data', 'fsdp', 'expert'), 'tensor', 'context'


class Options(NamedTuple):
    """What is fixed when the program is traced: the score rule, how keys travel, the work per step (None: chosen)."""

    scores: Scores
    context: str = 'ring'
    tile: Tile | None = None


def choose_tile(B: int, T: int, S: int) -> Tile:
    """Tile sizes by platform, measured by benchmarks/attention.py.

    On CPU a tile of scores should stay in the second-level cache; one row at a time lets every row skip by its own
    documents, but short rows have little to skip and go together. On GPU a step must be large enough to fill it.
    """
    if platform() != 'cpu':
        return Tile(1, min(1024, T), min(1024, S))
    return Tile(math.gcd(4, B) if T <= 256 else 1, min(64, T), min(64, S))


class Layout(NamedTuple):
    """Specs of q, k (and v), places and per-head values, and the axes to open."""

    q: P
    k: P
    place: P
    lse: P
    rows: tuple[str, ...]  # axes over which rows are split
    sequence: tuple[str, ...]  # axes over which the sequence is split
    heads: tuple[str, ...]  # axes over which query heads are split
    shared_kv: bool  # kv heads do not divide: every shard holds them all and picks its own

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.rows, *self.sequence, *self.heads)


def split(q_BTNH, k_BSKH) -> Layout:
    """How the operands are split over the automatic axes: query heads must divide, rows and sequence do where they can.

    Raises:
      ValueError: query heads that do not divide over `tensor`.
    """
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    heads, shards = auto([HEADS]), auto_size([HEADS])
    if N % shards:
        raise ValueError(f'attention: {N} query heads do not divide over tensor={shards}: expected a multiple of it')
    rows = auto(ROWS) if B % auto_size(ROWS) == 0 else ()
    cut = auto_size([SEQUENCE])
    sequence = auto([SEQUENCE]) if T % cut == 0 and S % cut == 0 else ()
    kv_heads = heads if K % shards == 0 else ()
    return Layout(
        q=P(rows, sequence, heads, None),
        k=P(rows, sequence, kv_heads, None),
        place=P(rows, sequence),
        lse=P(rows, sequence, heads),
        rows=rows,
        sequence=sequence,
        heads=heads,
        shared_kv=kv_heads != heads,
    )


def own_kv_heads(N: int, K: int):
    """Which of K whole kv heads this shard of N query heads reads, so that the local query heads fall in equal groups.

    Called inside the shard_map that `split` describes. With G = N / K query heads per kv head and M of them here, runs
    of gcd(G, M) query heads share a kv head on every shard: one index per run.
    """
    group, mine = N // K, N // axis_size([HEADS])
    run = math.gcd(group, mine)
    return (axis_index([HEADS]) * mine + jnp.arange(0, mine, run)) // group


def _directions(options: Options, q, k):
    """(forward, backward) for the sequence layout of here: whole, ring or gathered."""
    tile = options.tile or choose_tile(q.shape[0], q.shape[1], k.shape[1])
    rule, axes = options.scores, manual([SEQUENCE])
    if not axes:
        return partial(blockwise.forward, scores=rule, tile=tile), partial(blockwise.backward, scores=rule, tile=tile)
    ways = {
        'ring': (context.ring_forward, context.ring_backward),
        'gather': (context.gather_forward, context.gather_backward),
    }
    # In a tick only some devices run a pipeline stage: a ring's permutation would wait for all, a gather does not.
    forward, backward = ways['gather' if manual(['pipe']) else options.context]
    return (
        partial(forward, scores=rule, tile=tile, axis=SEQUENCE),
        partial(backward, scores=rule, tile=tile, axis=SEQUENCE),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def parallel_attention(options: Options, q_BTNH, k_BSKH, v_BSKH, sinks_N, places: Places):
    """Attention [B, T, N, Hv] in q's dtype; sinks [N] or None; differentiable in q, k, v and sinks.

    Raises:
      ValueError: query heads that do not divide over `tensor`.
    """
    return _attend(options, q_BTNH, k_BSKH, v_BSKH, sinks_N, places)[0]


def _attend(options: Options, q_BTNH, k_BSKH, v_BSKH, sinks_N, places: Places):
    layout = split(q_BTNH, k_BSKH)
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]

    def shard(q, k, v, sinks, places):
        if layout.shared_kv:
            own = own_kv_heads(N, K)
            k, v = k[:, :, own], v[:, :, own]
        forward, _ = _directions(options, q, k)
        out, lse = forward(q, k, v, places)
        if sinks is not None:
            total = jnp.logaddexp(lse, sinks.astype(lse.dtype)[None, None])
            out, lse = out * jnp.exp(lse - total)[..., None], total
        return out.astype(q.dtype), lse

    sinks_spec = None if sinks_N is None else P(layout.heads)
    run = local(shard, (layout.q, layout.k, layout.k, sinks_spec, layout.place), (layout.q, layout.lse), layout.axes)
    return run(q_BTNH, k_BSKH, v_BSKH, sinks_N, places)


def _attend_fwd(options: Options, q_BTNH, k_BSKH, v_BSKH, sinks_N, places: Places):
    out, lse = _attend(options, q_BTNH, k_BSKH, v_BSKH, sinks_N, places)
    # Named as the model names what attention puts out: a remat policy that keeps it need not run the forward again.
    out, lse = checkpoint_name(out, 'attention'), checkpoint_name(lse, 'attention')
    return out, (q_BTNH, k_BSKH, v_BSKH, sinks_N, places, out, lse)


def _attend_bwd(options: Options, residuals, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, places, out_BTNH, lse_BTN = residuals
    layout = split(q_BTNH, k_BSKH)
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]

    def shard(q, k, v, sinks, places, out, lse, dout):
        """Gradients of one device's rows, tokens and heads; what heads share is summed over them."""
        delta = jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), axis=-1)
        whole_k, whole_v = k, v
        if layout.shared_kv:
            own = own_kv_heads(N, K)
            k, v = k[:, :, own], v[:, :, own]
        _, backward = _directions(options, q, k)
        dq, dk, dv = backward(q, k, v, places, lse, delta, dout)
        if layout.shared_kv:
            dk = psum(jnp.zeros(whole_k.shape, dk.dtype).at[:, :, own].add(dk), layout.heads)
            dv = psum(jnp.zeros(whole_v.shape, dv.dtype).at[:, :, own].add(dv), layout.heads)
        dsinks = None
        if sinks is not None:
            share = jnp.exp(sinks.astype(lse.dtype)[None, None] - lse)
            dsinks = psum(-jnp.sum(share * delta, axis=(0, 1)), (*layout.rows, *layout.sequence)).astype(sinks.dtype)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dsinks

    sinks_spec = None if sinks_N is None else P(layout.heads)
    operands = (layout.q, layout.k, layout.k, sinks_spec)
    run = local(shard, (*operands, layout.place, layout.q, layout.lse, layout.q), operands, layout.axes)
    return *run(q_BTNH, k_BSKH, v_BSKH, sinks_N, places, out_BTNH, lse_BTN, dout_BTNH), None


parallel_attention.defvjp(_attend_fwd, _attend_bwd)
