"""What the state-space scan of ssd.py does chunk by chunk, forward and backward, on local arrays.

Dao and Gu, Transformers are SSMs (2024), section 6. Letters: P width of a head, Z size of the state, G groups, R heads
of a group, C places in a chunk, S the earlier of two of them. A chunk is four products: scores [C, S] of a group, those
weighted by decays with x, c with the state before, b with x for the state after. The backward pass is that of one chunk
at a time, computed again from the state before it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.local import platform


class Tokens(NamedTuple):
    """What there is of every token: arrays [B, T, ...], or cut: [chunks, B, C, ...], or of a chunk; or their specs."""

    x: Any
    dt: Any
    b: Any
    c: Any


class Places(NamedTuple):
    """Which tokens are real, and how many segments began before or at each (0: that of the first state goes on)."""

    real: jax.Array
    runs: jax.Array


def inner(state_BNPZ, groups: int):
    """States as [B, G, Z, R, P]: the products with them then read and write whole rows of R P numbers."""
    B, N, P, Z = state_BNPZ.shape
    return jnp.moveaxis(state_BNPZ.reshape(B, groups, N // groups, P, Z), -1, 2)


def outer(state_BGZRP):
    """The inverse of `inner`."""
    B, G, Z, R, P = state_BGZRP.shape
    return jnp.moveaxis(state_BGZRP, 2, -1).reshape(B, G * R, P, Z)


def _cut(chunk: int, x, mode: str = 'constant'):
    """[B, T, ...] -> [chunks, B, C, ...], padded."""
    missing = -x.shape[1] % chunk
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _join(x, T: int):
    """The inverse of `_cut`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


class _Marks(NamedTuple):
    """Places of a chunk (cut: of all chunks), and the run of the state that comes in."""

    real_BC: jax.Array
    runs_BC: jax.Array
    before_B: jax.Array


def _marks(chunk: int, places: Places) -> _Marks:
    # The slots that fill the last chunk belong to the last run: the state must outlive them.
    runs = _cut(chunk, places.runs, mode='edge')
    before = jnp.concatenate([jnp.zeros_like(runs[:1, :, 0]), runs[:-1, :, -1]])
    return _Marks(_cut(chunk, places.real), runs, before)


def _ahead(cut, direction: int):
    """What the first step of a scan needs, and for every step what the next one needs (the last: anything).

    Carried from step to step instead of read by each: XLA's CPU loops do not vectorize an exp whose operand is a slice
    of a longer array.
    """
    first = jax.tree.map(lambda v: v[0 if direction > 0 else -1], cut)
    return first, jax.tree.map(lambda v: jnp.roll(v, -direction, axis=0), cut)


def forward(chunk: int, tokens: Tokens, a_N, start_BGZRP, places: Places):
    """(y [B, T, N, P], last state, states at the start of every chunk [chunks, B, G, Z, R, P])."""

    def step(carry, cut):
        """One chunk, from the state before it."""
        state, (marks, log) = carry
        following, here = cut
        y, after = _chunk(marks, state, here, log)
        return (after, following), (y, state)

    logs = _logs(chunk, places.real, tokens.dt, a_N.astype(start_BGZRP.dtype))
    first, following = _ahead((_marks(chunk, places), logs), 1)
    cuts = following, jax.tree.map(partial(_cut, chunk), tokens)
    (last, _), (y, borders) = lax.scan(step, (start_BGZRP, first), cuts)
    return _join(y, tokens.x.shape[1]), last, borders


def backward(chunk: int, tokens: Tokens, a_N, places: Places, borders, dy_BTNP, dlast_BGZRP):
    """Gradients of tokens, a and the first state: chunks from the last, each computed again from the state before it.

    That of a is in at least float32, the others have the dtypes of what they belong to.
    """

    def step(carry, cut):
        """One chunk, from the gradient of the state after it."""
        dstate, (marks, log) = carry
        following, state, dy, here = cut
        _, pull = jax.vjp(partial(_chunk, marks), state, here, log)
        dstate, grads, dlog = pull((dy, dstate))
        return (dstate, following), (grads, dlog)

    logs, pull_logs = jax.vjp(partial(_logs, chunk, places.real), tokens.dt, a_N.astype(dlast_BGZRP.dtype))
    first, following = _ahead((_marks(chunk, places), logs), -1)
    cuts = following, borders, _cut(chunk, dy_BTNP), jax.tree.map(partial(_cut, chunk), tokens)
    (dstart, _), (grads, dlogs) = lax.scan(step, (dlast_BGZRP, first), cuts, reverse=True)
    grads = jax.tree.map(lambda grad: _join(grad, dy_BTNP.shape[1]), grads)
    ddt, da = pull_logs(dlogs)
    return grads._replace(dt=grads.dt + ddt), da, dstart


def _chunk(marks: _Marks, state_BGZRP, tokens: Tokens, log_BNC):
    """One chunk: y [B, C, N, P] and the state after it (Dao and Gu 2024, listing 1, for one block)."""
    stats = state_BGZRP.dtype
    B, C, N, P = tokens.x.shape
    G = tokens.b.shape[2]
    R = N // G
    dot = partial(_dot, stats)

    def real(v):
        return jnp.where(marks.real_BC.reshape(B, C, *[1] * (v.ndim - 2)), v, 0)

    x_BCNP, b_BCGZ, c_BCGZ = real(tokens.x), real(tokens.b), real(tokens.c)
    dtype = x_BCNP.dtype
    b_BGCZ, c_BGCZ = b_BCGZ.swapaxes(1, 2), c_BCGZ.swapaxes(1, 2)
    u_BCNP = real(tokens.dt).astype(stats)[..., None] * x_BCNP.astype(stats)
    u_BGCRP = u_BCNP.reshape(B, C, G, R, P).swapaxes(1, 2)
    log_BGRC = log_BNC.reshape(B, G, R, C)

    # Differences of logarithms are masked before exp.
    runs_BC = marks.runs_BC
    seen_BCS = (runs_BC[:, :, None] == runs_BC[:, None, :]) & jnp.tri(C, dtype=bool)[None]
    gap_BGRCS = log_BGRC[..., :, None] - log_BGRC[..., None, :]
    decay_BGRCS = jnp.exp(gap_BGRCS + jnp.where(seen_BCS, 0, -jnp.inf).astype(stats)[:, None, None])
    log_BGCR = log_BGRC.swapaxes(2, 3)
    opened_BGCR = jnp.exp(jnp.where((runs_BC == marks.before_B[:, None])[:, None, :, None], log_BGCR, -jnp.inf))
    closing = (runs_BC == runs_BC[:, -1:])[:, None, :, None]
    closed_BGCR = jnp.exp(jnp.where(closing, log_BGCR[:, :, -1:] - log_BGCR, -jnp.inf))

    scores_BGCS = dot('bgcz,bgsz->bgcs', c_BGCZ, b_BGCZ)
    weights_BGRCS = (_spread(2, R, scores_BGCS) * decay_BGRCS).astype(dtype)
    inner_BGRCP = dot('bgrcs,bgrsp->bgrcp', weights_BGRCS, u_BGCRP.swapaxes(2, 3).astype(dtype))
    outer_BGCRP = dot('bgcz,bgzrp->bgcrp', c_BGCZ, state_BGZRP.astype(dtype))
    y_BGCRP = inner_BGRCP.swapaxes(2, 3) + _spread(4, P, opened_BGCR) * outer_BGCRP
    y_BCNP = real(y_BGCRP.swapaxes(1, 2).reshape(B, C, N, P)).astype(dtype)
    left_BGCRP = (_spread(4, P, closed_BGCR) * u_BGCRP).astype(dtype)
    new_BGZRP = dot('bgcz,bgcrp->bgzrp', b_BGCZ, left_BGCRP)
    return y_BCNP, opened_BGCR[:, :, -1][:, :, None, :, None] * state_BGZRP + new_BGZRP


def _dot(stats, spec: str, a, b):
    """A product accumulated in `stats`. XLA's CPU lacks some of bfloat16 with float32 sums: wide operands there."""
    if platform() == 'cpu':
        a, b = a.astype(stats), b.astype(stats)
    return jnp.einsum(spec, a, b, preferred_element_type=stats)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(axis: int, size: int, x):
    """x with a new axis along which it is repeated."""
    return jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], size, *x.shape[axis:]))


def _spread_bwd(axis: int, size: int, _, grad):
    """Sums, on CPU by halves: plain additions, several times faster than what XLA makes of the reduction there."""
    while platform() == 'cpu' and size % 2 == 0:
        size //= 2
        grad = lax.slice_in_dim(grad, 0, size, axis=axis) + lax.slice_in_dim(grad, size, 2 * size, axis=axis)
    return (jnp.sum(grad, axis=axis),)


_spread.defvjp(lambda axis, size, x: (_spread(axis, size, x), None), _spread_bwd)


def _logs(chunk: int, real_BT, dt_BTN, a_N):
    """Logarithms of decays since the start of the chunk, [chunks, B, N, C], in the dtype of a."""
    dt_BTN = jnp.where(real_BT[..., None], dt_BTN, 0).astype(a_N.dtype)
    return jnp.cumsum(_cut(chunk, dt_BTN * a_N[None, None]).swapaxes(2, 3), axis=3)
