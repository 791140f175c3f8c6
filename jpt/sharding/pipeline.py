"""Pipeline parallelism inside a shard_map that is manual over `pipe`: GPipe, plain, and 1F1B, in constant memory.

Both take functions, not models (`Parts`), and return the gradients that `jax.grad` of the unpipelined step returns.
The ends of the model (embedding, head) run on all devices together: their vocabulary is divided over `pipe` as well, so
the head, as heavy as several layers, burdens no single stage. What they read and what comes of it is equal on all
stages, and so is its cotangent; only the layers' side differs from stage to stage. Sums over `pipe` are therefore
written out here and never left to the transpose of a collective, which would count every stage's copy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.sharding.timetable import Timetable

AXIS = 'pipe'
Tree = Any


class Parts(NamedTuple):
    """A training objective, cut for a pipeline; the frozen parameters are closed over.

    branches: one function (layers, chunk, carry, micro) -> carry for every distinct stage of the model, given one
    chunk of this device's layers. branch_of: int [pipe, chunks], which of them a stage is.
    """

    first: Callable[[Tree, Tree], Tree]  # (ends, micro) -> carry
    branches: list[Callable[[Tree, jax.Array, Tree, Tree], Tree]]
    branch_of: np.ndarray
    last: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]  # (ends, carry, micro) -> (total, sums)

    @property
    def chunks(self) -> int:
        return self.branch_of.shape[1]


class Result(NamedTuple):
    """Of all microbatches: the loss, the gradients of this device's layers and of the ends, and the metrics' sums."""

    total: jax.Array
    layers: Tree
    ends: Tree
    sums: Tree


def gpipe(parts: Parts, layers: Tree, ends: Tree, micros: Tree) -> Result:
    """All microbatches forward, then all backward, by `jax.grad` of one scan; memory grows with their number.

    layers: leaves [1, slots, ...], one chunk per device. micros: leaves [microbatches, ...], equal on all stages.
    """
    pipe, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    count = jax.tree.leaves(micros)[0].shape[0]

    def loss(layers: Tree, ends: Tree) -> tuple[jax.Array, Tree]:
        """All microbatches through all stages, then the head on each."""

        def tick(arrived: Tree, t: jax.Array) -> tuple[Tree, Tree]:
            entered = _enter(parts.first(ends, _at(micros, jnp.minimum(t, count - 1))))
            carry = _where(me == 0, entered, arrived)
            micro = _at(micros, jnp.clip(t - me, 0, count - 1))
            out = jax.lax.switch(_branch(parts, me, 0), parts.branches, _at(layers, 0), jnp.int32(0), carry, micro)
            return _pass_on(out, 1), out

        start = _zeros(jax.eval_shape(parts.first, ends, _at(micros, 0)))
        _, outs = jax.lax.scan(tick, start, jnp.arange(count + pipe - 1))
        leaving = _leave(jax.tree.map(lambda x: x[pipe - 1 :], outs))
        totals, sums = jax.lax.map(lambda pair: parts.last(ends, *pair), (leaving, micros))
        return jnp.sum(totals), jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    (total, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layers, ends)
    return Result(total, grads[0], grads[1], sums)


def forward(parts: Parts, table: Timetable, layers: Tree, ends: Tree, micros: Tree) -> tuple[jax.Array, Tree]:
    """Loss and metrics' sums alone, by the forward half of a timetable; arguments as for `one_f_one_b`."""
    carry, total, sums = _empty(parts, ends, micros)

    def tick(state: tuple[Tree, Tree], row: Any) -> tuple[tuple[Tree, Tree], None]:
        arrived, result = state
        out = _advance(parts, layers, ends, micros, row, arrived)[1]
        more = _if(row.head >= 0, lambda: parts.last(ends, _from_last(out), _at(micros, row.head)))
        return (_pass_on(out, 1, parts.chunks > 1), jax.tree.map(jnp.add, result, more)), None

    used = int(np.flatnonzero(table.rows.head >= 0)[-1]) + 1
    rows = jax.tree.map(lambda column: jnp.asarray(column[:used]), table.rows)
    return jax.lax.scan(tick, (carry, (total, sums)), rows)[0][1]


class _State(NamedTuple):
    """What one tick hands to the next."""

    arrived: Tree  # the carry from the stage before
    returned: Tree  # the carry's cotangent from the stage behind
    held: Tree  # inputs of this device's stages that wait for their backward, [slots, ...]
    result: Result


def one_f_one_b(parts: Parts, table: Timetable, layers: Tree, ends: Tree, micros: Tree) -> Result:
    """One forward, one backward, by a timetable; only the inputs of stages in flight are held.

    Backward recomputes a stage from its input. A device that is idle in a tick skips the work (`lax.switch`); which
    device that is depends on its place in `pipe` alone, so collectives over other axes inside a stage meet their peers.

    layers: leaves [chunks, slots, ...]. micros: leaves [microbatches, ...], equal on all stages.
    """
    last = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
    wrap = parts.chunks > 1
    carry, total, sums = _empty(parts, ends, micros)

    def tick(state: _State, row: Any) -> tuple[_State, None]:
        """One row of the timetable: forward, head, backward, embedding, each where this device has work."""
        here, out = _advance(parts, layers, ends, micros, row, state.arrived)
        held = _put(state.held, here, _mine(row.forward).slot)

        total, sums, head_grads, cotangent = _if(row.head >= 0, lambda: _head(parts, ends, out, _at(micros, row.head)))

        back = _mine(row.backward)
        behind = _where(last & (back.chunk == parts.chunks - 1), cotangent, state.returned)
        grads, cotangent = _retreat(parts, layers, back, _at(held, back.slot), micros, behind)
        embed_grads = _if(row.leave >= 0, lambda: _embed_grads(parts, ends, cotangent, _at(micros, row.leave)))

        before = state.result
        result = Result(
            before.total + total,
            _add_chunk(before.layers, grads, back),
            jax.tree.map(_add, before.ends, head_grads, embed_grads),
            jax.tree.map(jnp.add, before.sums, sums),
        )
        return _State(_pass_on(out, 1, wrap), _pass_on(cotangent, -1, wrap), held, result), None

    start = _State(
        carry,
        carry,
        jax.tree.map(lambda x: jnp.zeros((table.num_slots, *x.shape), x.dtype), carry),
        Result(total, wide_zeros(layers), wide_zeros(ends), sums),
    )
    return jax.lax.scan(tick, start, jax.tree.map(jnp.asarray, table.rows))[0].result


def _empty(parts: Parts, ends: Tree, micros: Tree) -> tuple[Tree, Tree, Tree]:
    """Zeros in the shape of the carry, of the loss and of the metrics."""
    carry = jax.eval_shape(parts.first, ends, _at(micros, 0))
    return _zeros((carry, *jax.eval_shape(parts.last, ends, carry, _at(micros, 0))))


def _advance(parts: Parts, layers: Tree, ends: Tree, micros: Tree, row: Any, arrived: Tree) -> tuple[Tree, Tree]:
    """Input and output of whatever stage this device runs forward in a tick; zeros put out by an idle device."""
    work = _mine(row.forward)
    entered = _if(row.embed >= 0, lambda: parts.first(ends, _at(micros, row.embed)))
    here = _where((jax.lax.axis_index(AXIS) == 0) & (work.chunk == 0), entered, arrived)

    def run(branch: Callable[..., Tree]) -> Callable[[], Tree]:
        return lambda: branch(_at(layers, work.chunk), work.chunk, here, _at(micros, work.micro))

    return here, _switch(parts, work, lambda: _zeros(here), [run(branch) for branch in parts.branches])


def _retreat(parts: Parts, layers: Tree, work: Any, here: Tree, micros: Tree, behind: Tree) -> tuple[Tree, Tree]:
    """Gradients of a chunk of layers and the cotangent of its input, by recomputing the stage; zeros where idle."""

    def run(branch: Callable[..., Tree]) -> Callable[[], tuple[Tree, Tree]]:
        def pull() -> tuple[Tree, Tree]:
            chunk, micro = _at(layers, work.chunk), _at(micros, work.micro)
            return jax.vjp(lambda params, x: branch(params, work.chunk, x, micro), chunk, here)[1](behind)

        return pull

    def idle() -> tuple[Tree, Tree]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), layers), _zeros(here)

    return _switch(parts, work, idle, [run(branch) for branch in parts.branches])


def _switch(parts: Parts, work: Any, idle: Callable[[], Tree], branches: list[Callable[[], Tree]]) -> Tree:
    """The branch of the stage that `work` names, or `idle` where it names none."""
    branch = _branch(parts, jax.lax.axis_index(AXIS), jnp.maximum(work.chunk, 0))
    return jax.lax.switch(jnp.where(work.micro >= 0, 1 + branch, 0), [idle, *branches])


def _mine(work: Any) -> Any:
    """This device's column of one row of the timetable."""
    return jax.tree.map(lambda column: column[jax.lax.axis_index(AXIS)], work)


def _head(parts: Parts, ends: Tree, out: Tree, micro: Tree) -> tuple[jax.Array, Tree, Tree, Tree]:
    """Loss, metrics and cotangents of what the last stage put out, computed by all stages together."""
    leaving = _from_last(out)
    total, pull, sums = jax.vjp(lambda ends, carry: parts.last(ends, carry, micro), ends, leaving, has_aux=True)
    return total, sums, *pull(jnp.ones_like(total))


def _embed_grads(parts: Parts, ends: Tree, cotangent: Tree, micro: Tree) -> Tree:
    """Gradients of the embedding from the cotangent that reached the first stage, by all stages together."""
    return jax.vjp(lambda ends: parts.first(ends, micro), ends)[1](_from_stage(cotangent, 0))[0]


def _from_stage(tree: Tree, stage: int) -> Tree:
    """One stage's values on all stages; a sum, of which only that stage's term is not zero."""
    mine = jax.lax.axis_index(AXIS) == stage
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), AXIS), tree)


def _from_last(tree: Tree) -> Tree:
    return _from_stage(tree, jax.lax.axis_size(AXIS) - 1)


def equal_on_stages(tree: Tree) -> Tree:
    """Values that all stages computed alike, made bit-equal: the first stage's."""
    return _from_stage(tree, 0)


@jax.custom_vjp
def _enter(carry: Tree) -> Tree:
    """What all stages computed alike and only the first one uses; its cotangent comes from there."""
    return carry


_enter.defvjp(lambda carry: (carry, None), lambda _, cotangent: (_from_stage(cotangent, 0),))


@jax.custom_vjp
def _leave(carry: Tree) -> Tree:
    """The last stage's values on all stages, which use them alike; its cotangent is the one each of them has."""
    return _from_last(carry)


def _leave_backward(_: None, cotangent: Tree) -> tuple[Tree]:
    mine = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
    return (jax.tree.map(lambda x: jnp.where(mine, x, jnp.zeros_like(x)), cotangent),)


_leave.defvjp(lambda carry: (_leave(carry), None), _leave_backward)


def _pass_on(tree: Tree, step: int, wrap: bool = False) -> Tree:
    """To the next stage (step 1) or the one before (-1); zeros arrive where no stage sends."""
    pipe = jax.lax.axis_size(AXIS)
    pairs = [(stage, (stage + step) % pipe) for stage in range(pipe) if wrap or 0 <= stage + step < pipe]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def _branch(parts: Parts, me: jax.Array, chunk: Any) -> jax.Array:
    return jnp.asarray(parts.branch_of, jnp.int32)[me, chunk]


def _if(condition: jax.Array, compute: Callable[[], Tree]) -> Tree:
    """`compute()` in the ticks where the condition, equal on all devices, holds; zeros in the others."""
    shape = jax.eval_shape(compute)
    return jax.lax.cond(condition, compute, lambda: _zeros(shape))


def _where(condition: jax.Array, yes: Tree, no: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _at(tree: Tree, index: Any) -> Tree:
    """Element `index` of every leaf's first axis; an index of -1 (nobody reads the result) gives the first."""
    at = jnp.maximum(index, 0)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), tree)


def _put(held: Tree, tree: Tree, slot: jax.Array) -> Tree:
    """Writes a stage's input to its slot; an idle device (slot -1) writes back what is there."""
    at = jnp.maximum(slot, 0)

    def put(ring: jax.Array, x: jax.Array) -> jax.Array:
        kept = jnp.where(slot >= 0, x, jax.lax.dynamic_index_in_dim(ring, at, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(ring, kept, at, 0)

    return jax.tree.map(put, held, tree)


def _add(total: jax.Array, *grads: jax.Array) -> jax.Array:
    return sum((grad.astype(total.dtype) for grad in grads), total)


def _add_chunk(sums: Tree, grads: Tree, work: Any) -> Tree:
    """Adds one chunk's gradients to this device's; an idle device's are zeros."""
    at = jnp.maximum(work.chunk, 0)
    return jax.tree.map(lambda total, grad: total.at[at].add(grad.astype(total.dtype)), sums, grads)


def wide_zeros(tree: Tree) -> Tree:
    """Zeros to add gradients to, in at least float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), tree)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
