"""Where generation lies on a mesh: rows over the batch axes, kv heads over `tensor`, no pipeline."""

import math
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size
from jpt.models.cache import Cache, KeysValues
from jpt.models.config import ModelConfig
from jpt.models.transformer import Params
from jpt.sharding.mesh import AXES, BATCH_AXES
from jpt.sharding.rules import Rules, param_specs, shardings, units_of


def without_pipeline(cfg: ModelConfig, params: Params, mesh: Mesh | None) -> tuple[Params, Mesh | None]:
    """The parameters, in the canonical layout, on a mesh whose `pipe` axis is folded into `data`.

    A token passes through the stages one after another, so for one token at a time all but one of them would wait.
    """
    if mesh is None or mesh.shape.get('pipe', 1) == 1:
        return params, mesh
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    sizes['data'], sizes['pipe'] = sizes['data'] * sizes['pipe'], 1
    # `pipe` is the first axis and `data` the second, so the order of the devices stays.
    devices = mesh.devices.reshape(tuple(sizes[axis] for axis in AXES))
    folded = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return jax.device_put(params, shardings(folded, param_specs(shapes, Rules(sizes, units_of(cfg))))), folded


def rows_over(mesh: Mesh | None) -> int:
    """How many groups of devices take rows of their own: a batch is a multiple of it."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def place_rows(tree: Any) -> Any:
    """The arrays [B, ...] of a tree with their rows over the batch axes of the mesh that is set, if one is."""
    rows = auto(BATCH_AXES)
    if not rows:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P(rows)), tree)


def place_cache(cfg: ModelConfig, cache: Cache) -> Cache:
    """The cache with rows over the batch axes and, where `tensor` divides them, kv heads over `tensor`."""
    rows, heads = auto(BATCH_AXES), auto(['tensor'])
    if not rows and not heads:
        return cache
    if cfg.num_kv_heads % auto_size(['tensor']):
        heads = ()

    def place(leaf: jax.Array, stacked: bool, over: tuple[str, ...]) -> jax.Array:
        stack = (None,) if stacked else ()
        return jax.lax.with_sharding_constraint(leaf, P(*stack, rows or None, over or None))

    layers = [
        [
            jax.tree.map(partial(place, stacked=segment.repeats > 1, over=heads if _has_heads(entry) else ()), entry)
            for entry in kinds
        ]
        for segment, kinds in zip(cfg.segments, cache.layers, strict=True)
    ]
    positions, segments = place_rows((cache.positions_BS, cache.segments_BS))
    return cache._replace(layers=layers, positions_BS=positions, segments_BS=segments)


def _has_heads(entry: Any) -> bool:
    """Whether the axis after the batch counts kv heads."""
    return isinstance(entry, KeysValues)


def everywhere(tree: Any) -> Any:
    """The arrays of a tree whole on every device, so that every process of a job can read them."""
    if not auto(AXES):
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)
