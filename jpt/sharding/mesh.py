"""The device mesh: six named axes, of which a run on one GPU has only ones."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('pipe', 'data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp', 'expert')  # the rows of a batch are divided over these
TOKEN_AXES = (*BATCH_AXES, 'context')  # every device along these sees other tokens


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    pipe: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}


def resolve_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """The size of every axis for this many devices, with -1 filled in.

    Raises:
        ValueError: a size is neither positive nor -1, two are -1, or the product is not the number of devices.
    """
    sizes = config.sizes()
    shown = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f'mesh.{axis}={size}: expected a positive number of devices, or -1 for those left over')
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f'mesh({shown}): at most one axis may be -1, but {" and ".join(free)} are')
    given = math.prod(size for size in sizes.values() if size != -1)
    if device_count % given or (not free and given != device_count):
        raise ValueError(
            f'mesh({shown}) asks for {"a multiple of " if free else ""}{given} devices, but there are {device_count}'
        )
    return {axis: device_count // given if size == -1 else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given), neighbours along `tensor` closest together.

    Raises:
        ValueError: see `resolve_sizes`.
    """
    chosen = list(jax.devices() if devices is None else devices)
    sizes = resolve_sizes(config, len(chosen))
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Sets the mesh for what is traced inside, where there is one: what runs on shards asks for it."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_spec(ndim: int = 2) -> P:
    """How an array [B, T, ...] of a batch lies on the mesh; an array [B] has ndim 1, a scalar 0."""
    return P(*(BATCH_AXES, 'context')[:ndim])


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """The sharding of every array of a batch, whose leaves are [B, T, ...], [B] or scalar."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, batch_spec(leaf.ndim)), batch)


def check_batch(mesh: Mesh, batch_size: int, length: int, num_microbatches: int) -> None:
    """Raises ValueError, with the sizes, where a batch [B, T] cannot be divided over the mesh and the microbatches."""
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if num_microbatches < 1:
        raise ValueError(f'num_microbatches={num_microbatches}: expected at least 1')
    if batch_size % (rows * num_microbatches):
        over = ' * '.join(f'{axis}={mesh.shape[axis]}' for axis in BATCH_AXES)
        raise ValueError(
            f'batch size {batch_size} is not a multiple of {over} * num_microbatches={num_microbatches} '
            f'= {rows * num_microbatches}'
        )
    if length % mesh.shape['context']:
        raise ValueError(f'sequence length {length} is not a multiple of context={mesh.shape["context"]}')
