"""Loss and gradients of one step on any mesh: microbatches, pipeline, and one reduction over the data axes."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jpt.sharding import pipeline
from jpt.sharding.fsdp import gather
from jpt.sharding.layout import Run, run_of, stage_bounds, take_run
from jpt.sharding.mesh import AXES, TOKEN_AXES, batch_spec, check_batch
from jpt.sharding.plan import Plan
from jpt.sharding.rules import keep_axes, map_specs, used_axes
from jpt.sharding.stages import LayerRun, whole_segments
from jpt.sharding.timetable import Timetable, timetable

# `tensor` stays automatic: models know no mesh, and the compiler divides their products.
MANUAL = frozenset(AXES) - {'tensor'}
Tree = Any


class Objective(Protocol):
    """Four pure functions, see jpt.training.objective; `layers` are given as LayerRun."""

    @property
    def counts(self) -> Callable[..., Tree]: ...
    @property
    def reads_load(self) -> bool: ...
    @property
    def first(self) -> Callable[..., Tree]: ...
    @property
    def stage(self) -> Callable[..., Tree]: ...
    @property
    def last(self) -> Callable[..., tuple[jax.Array, Tree]]: ...


def loss_and_grads(
    objective: Objective, params: Tree, frozen: Tree, batch: Tree, plan: Plan, step: jax.Array | int = 0
) -> tuple[Any, Tree, Tree]:
    """Loss, gradients and metrics of a whole batch [B, T]; call it under `jax.jit`.

    Gradients are added over microbatches on each device in at least float32 and summed over the mesh once (over `fsdp`
    by each microbatch's scatter to the shards). Neither they nor the loss depend on the plan, up to rounding.

    Args:
        params, frozen: in the device layout. batch: a pytree of arrays [B, T, ...] or [B]. step: updates made so far,
            for what an objective changes as it goes.

    Returns:
        total, gradients in the shape and layout of params, metrics {name: (sum, count)}.

    Raises:
        ValueError: a batch that does not divide over the mesh and the microbatches.
    """

    def body(params: Tree, frozen: Tree, batch: Tree, counts: Tree) -> tuple[jax.Array, Tree, Tree]:
        run = _pipelined if plan.layouts['model'].staged else _accumulated
        total, grads, sums = run(objective, plan, params, frozen, _microbatches(plan, batch), counts)
        return (
            _summed(plan, total),
            map_specs(functools.partial(_reduced, plan), plan.specs, grads),
            _summed(plan, sums),
        )

    counts = _counts(objective, params, frozen, batch, plan, step)
    return _on_mesh(body, plan, params, frozen, batch, counts, (P(), _manual_specs(plan.specs), P()))


def loss_and_sums(
    objective: Objective, params: Tree, frozen: Tree, batch: Tree, plan: Plan, step: jax.Array | int = 0
) -> Tree:
    """Metrics {name: (sum, count)} of a whole batch, the loss among them, without gradients; as `loss_and_grads`."""
    return _sums(objective, params, frozen, batch, _counts(objective, params, frozen, batch, plan, step), plan)


def outputs(objective: Objective, params: Tree, frozen: Tree, batch: Tree, plan: Plan) -> Tree:
    """What `last` gives beside a loss, as arrays [B, T, ...] of a whole batch; for a plan without a pipeline."""

    def body(params: Tree, frozen: Tree, batch: Tree, counts: Tree) -> Tree:
        micros = _microbatches(plan, batch)
        each = jax.lax.map(lambda micro: _composed(objective, plan, params, frozen, micro, counts)[1], micros)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)

    return _on_mesh(body, plan, params, frozen, batch, objective.counts(batch, 0), batch_spec())


def _counts(objective: Objective, params: Tree, frozen: Tree, batch: Tree, plan: Plan, step: jax.Array | int) -> Tree:
    """What an objective knows of the whole batch before its first microbatch.

    The load of experts takes a forward pass to know; a batch that is one microbatch has it in time without.
    """
    counts = objective.counts(batch, step)
    if not objective.reads_load or plan.num_microbatches == 1:
        return counts
    return counts | {'load': _sums(objective, params, frozen, batch, counts, plan)['load'][0]}


def _sums(objective: Objective, params: Tree, frozen: Tree, batch: Tree, counts: Tree, plan: Plan) -> Tree:
    def body(params: Tree, frozen: Tree, batch: Tree, counts: Tree) -> Tree:
        micros = _microbatches(plan, batch)
        if plan.layouts['model'].staged:
            parts, table, layers = _prepared(objective, plan, params, frozen, counts)
            sums = pipeline.forward(parts, table, layers, ends_of(params), micros)[1]
        else:
            each = jax.lax.map(lambda micro: _composed(objective, plan, params, frozen, micro, counts)[1], micros)
            sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
        return _summed(plan, sums)

    return _on_mesh(body, plan, params, frozen, batch, counts, P())


def _on_mesh(
    body: Callable[..., Tree], plan: Plan, params: Tree, frozen: Tree, batch: Tree, counts: Tree, out_specs: Any
) -> Tree:
    """`body` on local shards and the counts of the whole batch; itself on a single device."""
    leaves = [leaf for leaf in jax.tree.leaves(batch) if leaf.ndim > 1]
    check_batch(plan.mesh, leaves[0].shape[0], leaves[0].shape[1], plan.num_microbatches)
    if plan.mesh.size > 1:
        batch_specs = jax.tree.map(lambda leaf: batch_spec(leaf.ndim), batch)
        in_specs = (_manual_specs(plan.specs), _manual_specs(plan.frozen_specs), batch_specs, P())
        body = jax.shard_map(
            body, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=MANUAL, check_vma=False
        )
    return body(params, frozen, batch, counts)


def _manual_specs(specs: Tree) -> Tree:
    return map_specs(lambda spec: keep_axes(spec, MANUAL), specs)


def _microbatches(plan: Plan, batch: Tree) -> Tree:
    count = plan.num_microbatches
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def _summed(plan: Plan, tree: Tree) -> Tree:
    """Sums over all devices that see other tokens."""
    axes = _divided(plan, TOKEN_AXES)
    return jax.lax.psum(tree, axes) if axes else tree


def _divided(plan: Plan, axes: Iterable[str]) -> tuple[str, ...]:
    """Those of the axes that divide anything; XLA refuses a collective over axes of size 1 on a GPU mesh."""
    return tuple(axis for axis in axes if plan.mesh.shape[axis] > 1)


def _reduced(plan: Plan, spec: P, grad: jax.Array) -> jax.Array:
    """A gradient summed over the token axes that its parameter is not divided over, and equal on all stages."""
    axes = _divided(plan, (axis for axis in TOKEN_AXES if axis not in used_axes(spec)))
    summed = jax.lax.psum(grad, axes) if axes else grad
    if not _divided(plan, [pipeline.AXIS]) or pipeline.AXIS in used_axes(spec):
        return summed
    return pipeline.equal_on_stages(summed)


def _composed(
    objective: Objective, plan: Plan, params: Tree, frozen: Tree, micro: Tree, counts: Tree
) -> tuple[jax.Array, Tree]:
    """Loss and metrics of one microbatch, without a pipeline."""
    ends, frozen_ends = gather(ends_of(params), plan.dtype), gather(_each(ends_of, frozen), plan.dtype)
    layers, frozen_layers = _whole_runs(plan, params, frozen)
    carry = objective.stage(layers, frozen_layers, objective.first(ends, frozen_ends, micro), micro)
    return objective.last(ends, frozen_ends, carry, micro, counts)


def _accumulated(
    objective: Objective, plan: Plan, params: Tree, frozen: Tree, micros: Tree, counts: Tree
) -> tuple[jax.Array, Tree, Tree]:
    """Gradients added up over the microbatches, without a pipeline."""

    def loss(params: Tree, micro: Tree) -> tuple[jax.Array, Tree]:
        return _composed(objective, plan, params, frozen, micro, counts)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    micro = jax.tree.map(lambda x: x[0], micros)
    if plan.num_microbatches == 1:
        (total, sums), grads = value_and_grad(params, micro)
        return total, _widened(grads), sums

    def add(result: Tree, micro: Tree) -> tuple[Tree, None]:
        (total, sums), grads = value_and_grad(params, micro)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), result, ((total, sums), grads)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(loss, params, micro))
    ((total, sums), grads), _ = jax.lax.scan(add, (zeros, pipeline.wide_zeros(params)), micros)
    return total, grads, sums


def _widened(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def ends_of(tree: Tree) -> Tree:
    """A parameter tree without its layers."""
    return {name: part for name, part in tree.items() if name != 'layers'}


def _each(function: Callable[[Tree], Tree], trees: Mapping[str, Tree]) -> dict[str, Tree]:
    return {name: function(tree) for name, tree in trees.items()}


def _whole_runs(plan: Plan, params: Tree, frozen: Tree) -> tuple[LayerRun, dict[str, LayerRun]]:
    """All layers of all models, as Objective.stage takes them."""
    segments = {name: whole_segments(layout.segments) for name, layout in plan.layouts.items()}
    frozen_runs = {
        name: LayerRun(tree['layers'], None if name == 'model' else 0, segments[name]) for name, tree in frozen.items()
    }
    return LayerRun(params['layers'], 0, segments['model']), frozen_runs


def _pipelined(
    objective: Objective, plan: Plan, params: Tree, frozen: Tree, micros: Tree, counts: Tree
) -> tuple[jax.Array, Tree, Tree]:
    parts, table, layers = _prepared(objective, plan, params, frozen, counts)
    if plan.schedule == 'gpipe':
        result = pipeline.gpipe(parts, layers, ends_of(params), micros)
    else:
        result = pipeline.one_f_one_b(parts, table, layers, ends_of(params), micros)
    grads = {**result.ends, 'layers': jax.tree.map(lambda x: x[None], result.layers)}
    return result.total, _widened({name: grads[name] for name in params}), result.sums


def _prepared(
    objective: Objective, plan: Plan, params: Tree, frozen: Tree, counts: Tree
) -> tuple[pipeline.Parts, Timetable, Tree]:
    """What a pipeline takes: functions, timetable, and this device's layers [chunks, slots, ...]."""
    mine = functools.partial(jax.tree.map, lambda x: x[0])
    parts = _parts(objective, plan, frozen, _each(lambda tree: mine(tree['layers']), frozen), counts)
    layout = plan.layouts['model']
    return parts, timetable(layout.pipe, layout.chunks, plan.num_microbatches), mine(params['layers'])


def _parts(objective: Objective, plan: Plan, frozen: Tree, frozen_layers: Tree, counts: Tree) -> pipeline.Parts:
    """The objective's functions with everything but trainable parameters, carry and microbatch filled in."""

    def first(ends: Tree, micro: Tree) -> Tree:
        return objective.first(gather(ends, plan.dtype), gather(_each(ends_of, frozen), plan.dtype), micro)

    def last(ends: Tree, carry: Tree, micro: Tree) -> tuple[jax.Array, Tree]:
        opened = gather(ends, plan.dtype), gather(_each(ends_of, frozen), plan.dtype)
        return objective.last(*opened, carry, micro, counts)

    def branch(runs: dict[str, Run]) -> Callable[[Tree, jax.Array, Tree, Tree], Tree]:
        """The stages whose models have these runs of layers, as one function of a chunk's layers."""

        def stage(layers: Tree, chunk: jax.Array, carry: Tree, micro: Tree) -> Tree:
            at = jnp.maximum(chunk, 0) * layout.pipe + jax.lax.axis_index(pipeline.AXIS)
            frozen_runs = {}
            for name, run in runs.items():
                start = jnp.asarray(stage_bounds(plan.layouts[name]), jnp.int32)[at]
                frozen_chunk = jax.tree.map(lambda x: x[chunk], frozen_layers[name])
                frozen_runs[name] = LayerRun(take_run(frozen_chunk, run), start, run.segments)
            model = runs['model']
            trainable = LayerRun(take_run(layers, model), frozen_runs['model'].first, model.segments)
            frozen_runs['model'] = LayerRun(frozen_runs['model'].layers, None, model.segments)
            return objective.stage(trainable, frozen_runs, carry, micro)

        return stage

    layout = plan.layouts['model']
    by_stage = [
        {name: run_of(plan.layouts[name], stage)._replace(first=0) for name in plan.layouts}
        for stage in range(layout.num_stages)
    ]
    distinct = [runs for at, runs in enumerate(by_stage) if runs not in by_stage[:at]]
    branch_of = np.array([distinct.index(runs) for runs in by_stage]).reshape(layout.chunks, layout.pipe).T
    return pipeline.Parts(first, [branch(runs) for runs in distinct], branch_of, last)
