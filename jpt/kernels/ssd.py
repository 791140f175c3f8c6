"""The state-space recurrence of Mamba-2 in chunks, so that nearly all of its work is matrix products.

Dao and Gu, Transformers are SSMs (2024), sections 6 and 7: within a chunk the recurrence is a masked product of scores,
like attention; between chunks only a state [P, Z] per head goes on. Work and memory are linear in the length.

Shape letters beside the package's: P width of a head of x, Z size of the state, G groups of heads that share B and C,
R heads of a group. What is done in a chunk is in ssd_chunks.py; here are the arguments, meshes and differentiation.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jpt.kernels import ssd_chunks as chunks
from jpt.kernels.causal_conv import refuse_context
from jpt.kernels.local import auto, auto_size, local, platform, psum
from jpt.kernels.parallel_attention import HEADS, ROWS, own_kv_heads
from jpt.kernels.ssd_chunks import Places, Tokens


class SsdState(NamedTuple):
    """What the next call needs to go on where a row stopped."""

    state_BNPZ: jax.Array  # at least float32
    segment_B: jax.Array  # int32, the segment of the row's last real token; 0: there was none yet


def init_state(batch: int, heads: int, width: int, size: int, dtype: DTypeLike = jnp.float32) -> SsdState:
    """The state [batch, heads, width, size] of rows that have read nothing."""
    return SsdState(jnp.zeros((batch, heads, width, size), dtype), jnp.zeros(batch, jnp.int32))


def ssd(
    x_BTNP: jax.Array,
    dt_BTN: jax.Array,
    a_N: jax.Array,
    b_BTGZ: jax.Array,
    c_BTGZ: jax.Array,
    segments_BT: jax.Array,
    state: SsdState | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, SsdState]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T and y_t = h_t c_t for every head -> (y [B, T, N, P], state).

    Dao and Gu 2024, equation 19 without D, whose term the caller adds. Differentiable in everything but segments. The
    backward pass keeps the arguments and the state at every border of chunks ([T / chunk, B, N, P, Z]), and computes
    one chunk again at a time. Decays and states are held in at least float32; products take operands in the dtype of x
    and accumulate in at least float32.

    Args:
      x_BTNP: inputs, N heads of width P, any float dtype; y has the same.
      dt_BTN: step sizes, softplus and limits already applied; not negative.
      a_N: rates, negative.
      b_BTGZ, c_BTGZ: what enters the state and what reads it; N / G heads that lie together share a group.
      segments_BT: int, 0 = padding. The tokens of a segment lie together, and each segment starts from a state of 0.
        Padding may stand at either end of a row and counts as if it were not there: what the other arguments hold in it
        (NaN too) reaches nothing, and y is 0.
      state: of an earlier call, or None at the start. A row whose first segment is that of the state goes on.
      chunk: tokens per step; None picks by platform. The result does not depend on it but by rounding.

    Returns:
      y, and the state after the row's last real token (the one given, where a row holds padding only).

    On a mesh rows are split over data and fsdp and heads over `tensor`; groups that do not divide are held by every
    shard, which picks its own.

    Raises:
      ValueError: shapes that do not fit; heads that do not divide over `tensor`; a `context` axis larger than 1.
    """
    refuse_context('ssd')
    _check(x_BTNP, dt_BTN, a_N, b_BTGZ, c_BTGZ, segments_BT, state)
    B, T, N, P = x_BTNP.shape
    segments_BT = segments_BT.astype(jnp.int32)
    if state is None:
        state = init_state(B, N, P, b_BTGZ.shape[-1], jnp.promote_types(x_BTNP.dtype, jnp.float32))
    elif T == 1:
        y_BNP, state = ssd_step(x_BTNP[:, 0], dt_BTN[:, 0], a_N, b_BTGZ[:, 0], c_BTGZ[:, 0], segments_BT[:, 0], state)
        return y_BNP[:, None], state
    real_BT = segments_BT != 0
    known_BT = _known(segments_BT, state.segment_B)
    changes_BT = known_BT != jnp.concatenate([state.segment_B[:, None], known_BT[:, :-1]], axis=1)
    runs_BT = jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32)
    # A state that no token reads is dropped here: NaN in it would survive a decay of 0.
    goes_on_B = jnp.any(real_BT & (runs_BT == 0), axis=1) | (runs_BT[:, -1] == 0)
    start_BNPZ = jnp.where(goes_on_B[:, None, None, None], state.state_BNPZ, 0)
    start_BNPZ = start_BNPZ.astype(jnp.promote_types(x_BTNP.dtype, jnp.float32))
    tokens, places = Tokens(x_BTNP, dt_BTN, b_BTGZ, c_BTGZ), Places(real_BT, runs_BT)
    y_BTNP, last_BNPZ = _ssd(min(chunk or choose_chunk(T), T), tokens, a_N, start_BNPZ, places)
    return y_BTNP, SsdState(last_BNPZ, known_BT[:, -1])


def ssd_step(
    x_BNP: jax.Array,
    dt_BN: jax.Array,
    a_N: jax.Array,
    b_BGZ: jax.Array,
    c_BGZ: jax.Array,
    segments_B: jax.Array,
    state: SsdState,
) -> tuple[jax.Array, SsdState]:
    """One token of `ssd`, as decoding needs it: one pass over the state -> (y [B, N, P] in x's dtype, state).

    A row of segment 0 keeps its state and gives 0; one of another segment than its state's starts from 0.
    """
    stats = jnp.promote_types(x_BNP.dtype, jnp.float32)
    heads = x_BNP.shape[1] // b_BGZ.shape[1]
    # Shared by the heads of a group: the copies are small beside the state, which so keeps its axes (and sharding).
    b_BNZ, c_BNZ = (jnp.repeat(v.astype(stats), heads, axis=1) for v in (b_BGZ, c_BGZ))
    dt_BN = dt_BN.astype(stats)
    real_B, goes_on_B = (v[:, None, None, None] for v in (segments_B != 0, segments_B == state.segment_B))
    before_BNPZ = jnp.where(goes_on_B, state.state_BNPZ, 0).astype(stats)
    decay_BN = jnp.exp(dt_BN * a_N.astype(stats)[None])
    new_BNPZ = (dt_BN[:, :, None] * x_BNP.astype(stats))[..., None] * b_BNZ[:, :, None]
    after_BNPZ = decay_BN[:, :, None, None] * before_BNPZ + new_BNPZ
    y_BNP = jnp.sum(after_BNPZ * c_BNZ[:, :, None], axis=-1)
    kept_BNPZ = jnp.where(real_B, after_BNPZ.astype(state.state_BNPZ.dtype), state.state_BNPZ)
    segment_B = jnp.where(segments_B != 0, segments_B, state.segment_B)
    return jnp.where(real_B[..., 0], y_BNP, 0).astype(x_BNP.dtype), SsdState(kept_BNPZ, segment_B)


def choose_chunk(T: int) -> int:
    """Tokens per step, measured by benchmarks/ssd.py: chunks of about equal length, so that little is padded.

    Scores cost chunk operations per token and head, states P Z / chunk bytes: on CPU the scores of a chunk should stay
    in the cache, on GPU a step must be large enough to fill it.
    """
    most = 64 if platform() == 'cpu' else 256
    least = -(-T // -(-T // most))
    return min(T, -(-least // 16) * 16)


def _check(x, dt, a, b, c, segments, state) -> None:
    B, T, N, P = x.shape
    G, Z = b.shape[2:]
    wanted = {'dt': (dt, (B, T, N)), 'a': (a, (N,)), 'b': (b, (B, T, G, Z)), 'c': (c, (B, T, G, Z))}
    wanted['segments'] = segments, (B, T)
    if state is not None:
        wanted['state'] = state.state_BNPZ, (B, N, P, Z)
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f'ssd: {name} has shape {array.shape}: expected {shape} for x {x.shape} and b {b.shape}')
    if N % G:
        raise ValueError(f'ssd: {N} heads do not divide into {G} groups: expected a multiple of it')


def _known(segments_BT: jax.Array, before_B: jax.Array) -> jax.Array:
    """Segments with padding taken for part of the segment before it."""
    slots_BT = jnp.where(segments_BT != 0, jnp.arange(segments_BT.shape[1])[None], -1)
    latest_BT = lax.cummax(slots_BT, axis=1)
    known_BT = jnp.take_along_axis(segments_BT, jnp.maximum(latest_BT, 0), axis=1)
    return jnp.where(latest_BT < 0, before_B[:, None], known_BT)


class _Layout(NamedTuple):
    """Specs of what goes in and out, and the axes to open."""

    tokens: Tokens
    rates: PartitionSpec
    places: PartitionSpec
    state: PartitionSpec
    borders: PartitionSpec
    rows: tuple[str, ...]
    heads: tuple[str, ...]
    shared: bool  # groups do not divide: every shard holds them all and picks its own

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.rows, *self.heads)


def _layout(tokens: Tokens) -> _Layout:
    """How the operands are split over the automatic axes: heads must divide, rows do where they can."""
    B, _, N, _ = tokens.x.shape
    heads, shards = auto([HEADS]), auto_size([HEADS])
    if N % shards:
        raise ValueError(f'ssd: {N} heads do not divide over {HEADS}={shards}: expected a multiple of it')
    rows = auto(ROWS) if B % auto_size(ROWS) == 0 else ()
    shared = tokens.b.shape[2] % shards != 0
    head, group = PartitionSpec(rows, None, heads), PartitionSpec(rows, None, () if shared else heads)
    return _Layout(
        tokens=Tokens(head, head, group, group),
        rates=PartitionSpec(heads),
        places=PartitionSpec(rows),
        state=PartitionSpec(rows, heads),
        borders=PartitionSpec(None, rows, heads),
        rows=rows,
        heads=heads,
        shared=shared,
    )


def _own_groups(layout: _Layout, whole: Tokens, tokens: Tokens):
    """Local tokens with the groups that the local heads read, and the function that brings their gradients back."""
    if not layout.shared:
        return tokens, lambda grad: grad
    own = own_kv_heads(whole.x.shape[2], whole.b.shape[2])

    def put_back(grad):
        """Of all groups, summed over the shards; in at least float32 until then."""
        stats = jnp.promote_types(grad.dtype, jnp.float32)
        parts = jnp.zeros((*grad.shape[:2], *whole.b.shape[2:]), stats).at[:, :, own].add(grad.astype(stats))
        return psum(parts, layout.heads).astype(grad.dtype)

    return tokens._replace(b=tokens.b[:, :, own], c=tokens.c[:, :, own]), put_back


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(chunk: int, tokens: Tokens, a_N, start_BNPZ, places: Places):
    """(y, last state). The custom rule is outside the shard_maps: nothing is differentiated through a collective."""
    return _ssd_fwd(chunk, tokens, a_N, start_BNPZ, places)[0]


def _ssd_fwd(chunk: int, tokens: Tokens, a_N, start_BNPZ, places: Places):
    layout, whole = _layout(tokens), tokens

    def shard(tokens, a, start, places):
        own, _ = _own_groups(layout, whole, tokens)
        y, last, borders = chunks.forward(chunk, own, a, chunks.inner(start, own.b.shape[2]), places)
        return y, chunks.outer(last), borders

    specs = layout.tokens, layout.rates, layout.state, layout.places
    run = local(shard, specs, (layout.tokens.x, layout.state, layout.borders), layout.axes)
    y_BTNP, last_BNPZ, borders = run(tokens, a_N, start_BNPZ, places)
    # Named, so that a remat policy that keeps them need not run the forward again.
    y_BTNP, borders = checkpoint_name(y_BTNP, 'ssd'), checkpoint_name(borders, 'ssd')
    return (y_BTNP, last_BNPZ), (tokens, a_N, places, borders)


def _ssd_bwd(chunk: int, residuals, cotangents):
    tokens, a_N, places, borders = residuals
    layout, whole = _layout(tokens), tokens

    def shard(tokens, a, places, borders, dy, dlast):
        """Gradients of one device's rows and heads; what they share is summed over them."""
        own, put_back = _own_groups(layout, whole, tokens)
        dlast = chunks.inner(dlast, own.b.shape[2])
        grads, da, dstart = chunks.backward(chunk, own, a, places, borders, dy, dlast)
        grads = grads._replace(b=put_back(grads.b), c=put_back(grads.c))
        return grads, psum(da, layout.rows).astype(a.dtype), chunks.outer(dstart)

    specs = layout.tokens, layout.rates, layout.places, layout.borders, layout.tokens.x, layout.state
    run = local(shard, specs, (layout.tokens, layout.rates, layout.state), layout.axes)
    return *run(tokens, a_N, places, borders, *cotangents), None


_ssd.defvjp(_ssd_fwd, _ssd_bwd)
