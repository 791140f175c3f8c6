"""Where generation lies on a mesh: rows over the batch axes, heads over `tensor`, no pipeline."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size
from jpt.models.cache import Cache, KeysValues, Latents, Recurrent
from jpt.models.config import ModelConfig
from jpt.models.transformer import Params
from jpt.sharding.mesh import AXES, BATCH_AXES
from jpt.sharding.rules import MESH_AXES, Rules, Units, param_specs, shardings, units_of

# The logical axes that follow the rows [B] in each array of an entry, as the projections that write it are divided. All
# heads read the same latents, so every device holds those of its rows whole. The tails of x, B and C are arrays of
# their own; their channels lie head by head and group by group.
CACHE_AXES: dict[type, tuple[tuple[str | None, ...], ...]] = {
    KeysValues: (('kv_heads',), ('kv_heads',)),
    Latents: ((),),
    Recurrent: ((None, 'ssm_heads'), (None, 'ssm_groups'), (None, 'ssm_groups'), ('ssm_heads',), ()),
    tuple: (),  # of a layer without a mixer
}


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
    """The cache with rows over the batch axes and heads, or groups of them, over `tensor` where it divides them."""
    if not auto((*BATCH_AXES, 'tensor')):
        return cache
    units = units_of(cfg)
    layers = [
        [_place_entry(units, entry, stacked=segment.repeats > 1) for entry in kinds]
        for segment, kinds in zip(cfg.segments, cache.layers, strict=True)
    ]
    positions, segments = place_rows((cache.positions_BS, cache.segments_BS))
    return cache._replace(layers=layers, positions_BS=positions, segments_BS=segments)


def _place_entry(units: Units, entry: Any, stacked: bool) -> Any:
    before = (*(None,) * stacked, auto(BATCH_AXES) or None)

    def place(leaf: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, P(*before, *(_over(units, axis) for axis in axes)))

    return type(entry)(*(place(*pair) for pair in zip(entry, CACHE_AXES[type(entry)], strict=True)))


def _over(units: Units, axis: str | None) -> tuple[str, ...] | None:
    """The mesh axes that divide a logical axis into whole heads or groups."""
    if axis is None or getattr(units, axis) % auto_size(MESH_AXES[axis]):
        return None
    return auto(MESH_AXES[axis]) or None


def everywhere(tree: Any) -> Any:
    """The arrays of a tree whole on every device, so that every process of a job can read them."""
    if not auto(AXES):
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)
