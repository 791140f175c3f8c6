"""A mixture of experts on any mesh: tokens sorted by expert, and exchanged over `expert` where each shard holds some.

Every shard sends the rows of other shards' experts to them with room for FACTOR times an even share
(jpt/kernels/ragged_exchange.py); rows that do not fit wait for a further round, so all are delivered. With an even
router there is one round. What every expert computes is given by the caller. The experts' inner width may be divided
over `tensor`: then what comes out are partial sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size, axis_index, axis_size, local
from jpt.kernels.parallel_attention import ROWS, SEQUENCE
from jpt.kernels.ragged_exchange import Exchange, check_form, make_exchange, returned, round_of, sent

EXPERT, TENSOR = 'expert', 'tensor'
FACTOR = 1.5
LATE = 'late_round'  # what an even router does not need, by the names that a compiled program gives its operations
# How the weights of all experts lie, by name: kernels [E, out, in], biases [E, out].
SPECS = {
    'up': P(EXPERT, TENSOR),
    'gate': P(EXPERT, TENSOR),
    'down': P(EXPERT, None, TENSOR),
    'up_bias': P(EXPERT, TENSOR),
    'gate_bias': P(EXPERT, TENSOR),
    'down_bias': P(EXPERT),
}
OTHER = '_other'  # behind a name: a kernel that is compared with the one of that name, and lies as it does


class Rows(NamedTuple):
    """Tokens sorted by expert: expert e has the next sizes_E[e] rows of x [M, D]; rows beyond all are nobody's."""

    x_MD: jax.Array
    sizes_E: jax.Array

    def of_expert(self, values_EX: jax.Array) -> jax.Array:
        """The values of each row's expert [M, X]; 0 for rows that are nobody's."""
        ends = jnp.cumsum(self.sizes_E)
        expert = jnp.searchsorted(ends, jnp.arange(self.x_MD.shape[0], dtype=ends.dtype), side='right')
        return jnp.take(values_EX, expert, axis=0, mode='fill', fill_value=0)


Run = Callable[[dict[str, Any], Rows], jax.Array]


def mixture(
    run: Run,
    x_BTD,
    ids_BTJ,
    weights_BTJ,
    kernels: dict[str, Any],
    count: int,
    *,
    on_input: bool = False,
    factor: float = FACTOR,
    exchange: str = 'padded',
):
    """sum_j weights[j] * expert ids[j] (x) for every token, [B, T, D], and how many rows needed a further round.

    Differentiable in x, weights and kernels.

    Args:
      run: the experts: (kernels, Rows) -> [M, D], or another width and dtype, of all then; 0 for rows of nobody.
      ids_BTJ: int32, from 0 to count; `count` itself stands for no expert.
      weights_BTJ: in the dtype of x.
      kernels: by a name of SPECS, [E, out, in] or [E, out], a shard's own experts where `expert` is manual.
      on_input: the weights multiply what experts read, not what they return.
      factor: room for rows in a round of exchange, as a multiple of an even share: of what a shard gets from all
        ('ragged'), or of what it gets from each ('padded').
      exchange: 'padded', blocks of one size, or 'ragged', only what must travel, for which XLA needs a GPU.

    Raises:
      ValueError: experts that do not divide over `expert`, kernels of another number of experts, or a form of exchange
        that is not there.
    """
    shards = axis_size([EXPERT]) * auto_size([EXPERT])
    _check(kernels, count, shards)
    check_form(exchange)
    batch, length = x_BTD.shape[:2]
    rows = auto(ROWS) if batch % auto_size(ROWS) == 0 else ()
    sequence = auto([SEQUENCE]) if length % auto_size([SEQUENCE]) == 0 else ()
    # Rows that all shards of `expert` hold alike are worked on by each with its own experts, and the results added.
    alike = auto([EXPERT]) if EXPERT not in rows else ()
    partial = (*alike, *auto([TENSOR]))

    def shard(x, ids, weights, kernels):
        """What the experts of this shard make of its rows, and its share of late ones."""
        x_MD, ids_MJ, weights_MJ = (y.reshape(-1, y.shape[-1]) for y in (x, ids, weights))
        own, kernels = count // shards, _bias_once(kernels)
        if axis_size([EXPERT]) > 1 and not alike:
            rounds = make_exchange(exchange, EXPERT, shards, ids_MJ.size, factor)
            out, late = _exchanged(run, x_MD, ids_MJ, weights_MJ, kernels, count, on_input, rounds)
        else:
            mine = ids_MJ - axis_index([EXPERT]) * own
            mine = jnp.where((mine >= 0) & (mine < own), mine, own)
            out, late = _here(run, x_MD, mine, weights_MJ, kernels, own, on_input), jnp.zeros((), jnp.float32)
        return out.reshape(1, *x.shape[:-1], out.shape[-1]), late[None]

    token = P(rows, sequence)
    specs = (token, token, token, {name: kernel_specs(name, kernel) for name, kernel in kernels.items()})
    opened = (*rows, *sequence, *partial)
    out, late = local(shard, specs, (P(partial, *token), P((*rows, *sequence))), opened)(
        x_BTD, ids_BTJ, weights_BTJ, kernels
    )
    return jnp.sum(out, axis=0, dtype=out.dtype), lax.stop_gradient(jnp.sum(late))


def kernel_specs(name: str, kernel: Any) -> Any:
    """How a kernel of this name in SPECS lies on the mesh that is set; a weight type says how each of its arrays does.

    Raises:
      ValueError: a weight type of which a shard would hold too small a part.
    """
    spec = SPECS[name.removesuffix(OTHER)]
    if not hasattr(kernel, 'local_specs'):
        return spec
    sizes = {axis: auto_size([axis]) for axis in (EXPERT, TENSOR)}
    return kernel.local_specs(P(*spec, *[None] * (kernel.ndim - len(spec))), sizes, f"experts' {name}")


def _bias_once(kernels: dict[str, Any]) -> dict[str, Any]:
    """Kernels of which only the first shard of `tensor` has the last bias, where sums over it are still to be made."""
    if 'down_bias' not in kernels:
        return kernels
    return kernels | {'down_bias': jnp.where(axis_index([TENSOR]) == 0, kernels['down_bias'], 0)}


def _check(kernels: dict[str, Any], count: int, shards: int) -> None:
    if count % shards:
        raise ValueError(f'{count} experts do not divide over expert={shards}: expected a multiple of it')
    here = count // axis_size([EXPERT])
    for name, kernel in kernels.items():
        if kernel.shape[0] != here:
            raise ValueError(f"experts' {name} has shape {kernel.shape}: expected kernels of {here} experts")


def _here(run: Run, x_MD, ids_MJ, weights_MJ, kernels, count: int, on_input: bool):
    """The mixture where all experts of interest are on this device."""
    order, inverse, sizes = _sorted(ids_MJ.reshape(-1), count)
    rows, weights_MJ = _inputs(x_MD, order, inverse, weights_MJ, on_input)
    return _weighed(run(kernels, Rows(rows, sizes)), order, inverse, weights_MJ)


def _inputs(x_MD, order, inverse, weights_MJ, on_input: bool):
    """What the experts read, sorted by expert, and the weights of what they return."""
    rows = _spread(x_MD, order, inverse, weights_MJ.shape[1])
    if not on_input:
        return rows, weights_MJ
    return rows * _permuted(weights_MJ.reshape(-1, 1), order, inverse), jnp.ones_like(weights_MJ)


def _weighed(out, order, inverse, weights_MJ):
    """The weighted sum over the experts of every token [M, D], from rows sorted by expert."""
    each = _permuted(out, inverse, order).reshape(*weights_MJ.shape, -1)
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return jnp.einsum('mjd,mj->md', each, weights_MJ, preferred_element_type=wide).astype(out.dtype)


def _sorted(ids, count: int):
    """(order, inverse, sizes): rows sorted by expert, in the order they came; rows of no expert (id = count) last."""
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order).astype(jnp.int32)
    return order, inverse, jnp.zeros(count + 1, jnp.int32).at[ids].add(1)[:count]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_MD, order, inverse, copies: int):
    """`copies` of every token, sorted by expert: [M * J, D]. Its gradient gathers too, where autodiff would scatter."""
    del inverse
    return x_MD[order // copies]


def _spread_backward(copies: int, inverse, dy):
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    dx = jnp.sum(dy[inverse].reshape(-1, copies, dy.shape[-1]), axis=1, dtype=wide)
    return dx.astype(dy.dtype), None, None


_spread.defvjp(lambda x, order, inverse, copies: (_spread(x, order, inverse, copies), inverse), _spread_backward)


@jax.custom_vjp
def _permuted(x, order, inverse):
    """x[order], of which `inverse` is the inverse permutation."""
    del inverse
    return x[order]


_permuted.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda both, dy: (_permuted(dy, both[1], both[0]), None, None),
)


class _Counts(NamedTuple):
    """All that shards must know of each other, a few integers."""

    load_SR: jax.Array  # rows that each shard has for each
    ends_SX: jax.Array  # where the rows of each shard for every expert of this one end, among all that it has


def _exchanged(run: Run, x_MD, ids_MJ, weights_MJ, kernels, count: int, on_input: bool, exchange: Exchange):
    """The mixture where every shard of `expert` has its own tokens and its own experts."""
    order, inverse, sizes = _sorted(ids_MJ.reshape(-1), count)
    rows, weights_MJ = _inputs(x_MD, order, inverse, weights_MJ, on_input)
    me, own, shards = axis_index([EXPERT]), count // exchange.shards, exchange.shards
    counts_SE = lax.all_gather(sizes, EXPERT)
    load_SR = jnp.sum(counts_SE.reshape(shards, shards, own), axis=2, dtype=jnp.int32)
    ends_SE = jnp.cumsum(counts_SE, axis=1, dtype=jnp.int32)
    counts = _Counts(load_SR, lax.dynamic_slice_in_dim(ends_SE, me * own, own, axis=1))

    def further(total, turn):
        return _late_round(run, exchange, total, rows, kernels, counts, turn), None

    out = _round(run, exchange, rows, kernels, counts, jnp.int32(0))
    out, _ = lax.scan(further, out, jnp.arange(1, exchange.rounds, dtype=jnp.int32))
    late = jnp.sum((load_SR - round_of(exchange, load_SR, jnp.int32(0)).sizes_SR)[me]).astype(jnp.float32)
    return _weighed(out, order, inverse, weights_MJ), late


def _round(run: Run, exchange: Exchange, rows_MD, kernels, counts: _Counts, turn):
    """One round: rows there, experts, results back; 0 for rows of other rounds."""
    travel, me = round_of(exchange, counts.load_SR, turn), axis_index([EXPERT])
    upto_SX = jnp.clip(counts.ends_SX - travel.begins_SR[:, me, None], 0, travel.sizes_SR[:, me, None])
    arriving_SX = jnp.diff(upto_SX, axis=1, prepend=0)
    arrived, back = (_regrouped(sizes, exchange.capacity) for sizes in (arriving_SX, arriving_SX.T))
    x = _permuted(sent(rows_MD, travel, exchange), arrived, back)
    out = run(kernels, Rows(x, jnp.sum(arriving_SX, axis=0, dtype=jnp.int32)))
    return returned(_permuted(out, back, arrived), travel, exchange)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _late_round(run: Run, exchange: Exchange, total_MD, rows_MD, kernels, counts: _Counts, turn):
    """The sum with that of one more round, if there are rows for it.

    Made again in the backward pass, in one branch: autodiff would hand what the round reads out of a branch, copies of
    kernels, and the scan would stack them.
    """
    with jax.named_scope(LATE):
        more = turn < exchange.needed(counts.load_SR)
        new = functools.partial(_round, run, exchange, rows_MD, kernels, counts, turn)
        return lax.cond(more, lambda total: total + new(), lambda total: total, total_MD)


def _late_round_forward(run: Run, exchange: Exchange, total_MD, *given):
    return _late_round(run, exchange, total_MD, *given), given


def _late_round_backward(run: Run, exchange: Exchange, given, d_MD):
    rows_MD, kernels, counts, turn = given

    def again(d_MD):
        _, pull = jax.vjp(lambda rows, own: _round(run, exchange, rows, own, counts, turn), rows_MD, kernels)
        return jax.tree.map(lambda d: None if d.dtype == jax.dtypes.float0 else d, pull(d_MD))

    def zero(x):  # codes in integers have no gradient
        return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None

    with jax.named_scope(LATE):
        more = turn < exchange.needed(counts.load_SR)
        d_inputs = lax.cond(more, again, lambda _: jax.tree.map(zero, (rows_MD, kernels)), d_MD)
    return (d_MD, *d_inputs, None, None)


_late_round.defvjp(_late_round_forward, _late_round_backward)


def _regrouped(sizes_AB, count: int):
    """Of `count` rows that lie by a and then by b, the order by b and then by a; rows beyond all keep their places."""
    sizes = sizes_AB.T.reshape(-1)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = jnp.cumsum(sizes_AB.reshape(-1), dtype=jnp.int32) - sizes_AB.reshape(-1)
    shift = jnp.append(starts.reshape(sizes_AB.shape).T.reshape(-1) - (ends - sizes), 0)
    row = jnp.arange(count, dtype=jnp.int32)
    return row + shift[jnp.searchsorted(ends, row, side='right')]
