"""Where generation lies on a mesh: rows over the batch axes, kv heads over `tensor`, no pipeline."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size
from jpt.models.cache import KVCache
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


def place_cache(cfg: ModelConfig, cache: KVCache) -> KVCache:
    """The cache with rows over the batch axes and, where `tensor` divides them, kv heads over `tensor`."""
    rows, heads = auto(BATCH_AXES), auto(['tensor'])
    if not rows and not heads:
        return cache
    if cfg.num_kv_heads % auto_size(['tensor']):
        heads = ()

    def place(leaf: jax.Array) -> jax.Array:
        stack = (None,) * (leaf.ndim - 4)
        return jax.lax.with_sharding_constraint(leaf, P(*stack, rows or None, heads or None))

    keys, values = jax.tree.map(place, (cache.keys, cache.values))
    positions, segments = place_rows((cache.positions_BS, cache.segments_BS))
    return cache._replace(keys=keys, values=values, positions_BS=positions, segments_BS=segments)


def everywhere(tree: Any) -> Any:
    """The arrays of a tree whole on every device, so that every process of a job can read them."""
    if not auto(AXES):
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)
