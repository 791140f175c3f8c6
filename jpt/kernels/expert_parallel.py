"""A mixture of experts on any mesh: tokens sorted by expert, and exchanged over `expert` where each shard holds some.

Every shard sends the rows of other shards' experts in a padded all-to-all of FACTOR times its even share to each; rows
that do not fit wait for a further round, so all are delivered. With an even router there is one round. What every
expert computes is given by the caller. The experts' inner width may be divided over `tensor`: then what comes out are
partial sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size, axis_index, axis_size, local, manual, pmax
from jpt.kernels.parallel_attention import ROWS, SEQUENCE

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
):
    """sum_j weights[j] * expert ids[j] (x) for every token, [B, T, D], and how many rows needed a further round.

    Differentiable in x, weights and kernels.

    Args:
      run: the experts: (kernels, Rows) -> [M, D]; rows that belong to nobody give 0.
      ids_BTJ: int32, from 0 to count; `count` itself stands for no expert.
      weights_BTJ: in the dtype of x.
      kernels: by a name of SPECS, [E, out, in] or [E, out], a shard's own experts where `expert` is manual.
      on_input: the weights multiply what experts read, not what they return.
      factor: room for rows in a round of exchange, as a multiple of an even share.

    Raises:
      ValueError: experts that do not divide over `expert`, or kernels of another number of experts.
    """
    shards = axis_size([EXPERT]) * auto_size([EXPERT])
    _check(kernels, count, shards)
    batch, length = x_BTD.shape[:2]
    rows = auto(ROWS) if batch % auto_size(ROWS) == 0 else ()
    sequence = auto([SEQUENCE]) if length % auto_size([SEQUENCE]) == 0 else ()
    # Rows that all shards of `expert` hold alike are worked on by each with its own experts, and the results added.
    alike = auto([EXPERT]) if EXPERT not in rows else ()
    partial = (*alike, *auto([TENSOR]))

    def shard(x, ids, weights, kernels):
        x_MD, ids_MJ, weights_MJ = (y.reshape(-1, y.shape[-1]) for y in (x, ids, weights))
        own = count // shards
        if 'down_bias' in kernels:  # once, where sums over `tensor` are still to be made
            kernels = kernels | {'down_bias': jnp.where(axis_index([TENSOR]) == 0, kernels['down_bias'], 0)}
        if axis_size([EXPERT]) > 1 and not alike:
            out, late = _exchanged(run, x_MD, ids_MJ, weights_MJ, kernels, count, on_input, factor)
        else:
            mine = ids_MJ - axis_index([EXPERT]) * own
            mine = jnp.where((mine >= 0) & (mine < own), mine, own)
            out, late = _here(run, x_MD, mine, weights_MJ, kernels, own, on_input), jnp.zeros((), jnp.float32)
        return out.reshape(1, *x.shape), late[None]

    token = P(rows, sequence)
    specs = (token, token, token, {name: SPECS[name] for name in kernels})
    opened = (*rows, *sequence, *partial)
    out, late = local(shard, specs, (P(partial, *token), P((*rows, *sequence))), opened)(
        x_BTD, ids_BTJ, weights_BTJ, kernels
    )
    return jnp.sum(out, axis=0, dtype=x_BTD.dtype), lax.stop_gradient(jnp.sum(late))


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


class _Round(NamedTuple):
    """Which sorted row travels in which slot of one round of exchange, and back."""

    slots: jax.Array  # [shards, room] the sorted row in each slot
    used: jax.Array  # bool [shards, room]
    shard: jax.Array  # [rows] where each sorted row goes
    place: jax.Array  # [rows] its slot there
    now: jax.Array  # bool [rows] whether it travels in this round


@jax.custom_vjp
def _packed(rows_MD, plan: _Round):
    """Rows [M, D] in the slots [shards, room, D] of a round; unused slots are 0."""
    return jnp.where(plan.used[..., None], rows_MD[plan.slots], 0)


@jax.custom_vjp
def _unpacked(slots, plan: _Round):
    """The inverse of `_packed`, and its transpose: rows of other rounds are 0."""
    return jnp.where(plan.now[:, None], slots[plan.shard, plan.place], 0)


_packed.defvjp(lambda rows, plan: (_packed(rows, plan), plan), lambda plan, d: (_unpacked(d, plan), None))
_unpacked.defvjp(lambda slots, plan: (_unpacked(slots, plan), plan), lambda plan, d: (_packed(d, plan), None))


def _exchanged(run: Run, x_MD, ids_MJ, weights_MJ, kernels, count: int, on_input: bool, factor: float):
    """The mixture where every shard of `expert` has its own tokens and its own experts."""
    shards = axis_size([EXPERT])
    own = count // shards
    flat = ids_MJ.reshape(-1)
    order, inverse, sizes = _sorted(flat, count)
    rows, weights_MJ = _inputs(x_MD, order, inverse, weights_MJ, on_input)
    ids = flat[order]
    room = min(len(flat), 8 * math.ceil(factor * len(flat) / shards / 8))
    load = sizes.reshape(shards, own).sum(axis=1)  # rows for each shard
    start = jnp.cumsum(load) - load
    target = jnp.minimum(ids // own, shards - 1)
    behind = jnp.arange(len(flat), dtype=jnp.int32) - start[target]

    def deliver(turn):
        """One round: rows there, experts, results back."""
        offset = turn * room + jnp.arange(room, dtype=jnp.int32)[None]
        slots = jnp.minimum(start[:, None] + offset, len(flat) - 1)
        used = offset < load[:, None]
        now = (ids < count) & (behind // room == turn)
        plan = _Round(slots, used, target, jnp.clip(behind - turn * room, 0, room - 1), now)
        expert = jnp.where(used, ids[slots] - own * jnp.arange(shards, dtype=jnp.int32)[:, None], own)
        x, expert = (_swapped(array) for array in (_packed(rows, plan), expert))
        arrived, back, sizes = _sorted(expert.reshape(-1), own)
        out = run(kernels, Rows(_permuted(x.reshape(-1, x.shape[-1]), arrived, back), sizes))
        return _unpacked(_swapped(_permuted(out, back, arrived).reshape(x.shape)), plan)

    needed = pmax(jnp.max(-(-load // room)), [EXPERT])

    # Made again in the backward pass as a whole: a branch would hand out what it reads, and the scan stack it.
    @jax.checkpoint
    def late_round(turn):
        with jax.named_scope(LATE):
            return lax.cond(turn < needed, deliver, lambda _: jnp.zeros_like(rows), turn)

    def further(total, turn):
        return total + late_round(turn), None

    out, _ = lax.scan(further, deliver(jnp.int32(0)), jnp.arange(1, -(-len(flat) // room), dtype=jnp.int32))
    late = jnp.sum(jnp.maximum(load - room, 0)).astype(jnp.float32)
    return _weighed(out, order, inverse, weights_MJ), late


def _swapped(array):
    """[shards, room, ...]: what was meant for each shard, for what each shard meant for this one."""
    return lax.all_to_all(array, manual([EXPERT])[0], split_axis=0, concat_axis=0)
