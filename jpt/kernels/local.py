"""Run a function on the local shards of a mesh, and the few collectives that are the identity without one.

Under automatic axes the compiler decides what moves. Where it would gather (a scan over blocks, a lookup by index, a
collective written by hand) the function is run inside a nested shard_map instead, over those axes only that are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def mesh_axes(kind: AxisType) -> dict[str, int]:
    """Sizes of the axes of this kind in the current abstract mesh, those of size 1 left out."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: mesh.shape[name]
        for name, axis_type in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if axis_type == kind and mesh.shape[name] > 1
    }


def platform() -> str:
    """Where the traced program will run: the mesh's platform (ahead-of-time compiles too), else the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
    found = getattr(device, 'platform', None) or jax.default_backend()
    return 'gpu' if found in ('cuda', 'rocm') else found


def local(fn: Callable, in_specs, out_specs, axes: Sequence[str]) -> Callable:
    """`fn` on local shards over those of `axes` that are automatic and larger than 1; `fn` itself where there are none.

    Args:
      fn: a function of arrays (or pytrees of arrays).
      in_specs, out_specs: PartitionSpecs as `jax.shard_map` takes them. Axes that are absent, of size 1 or already
        manual (inside an outer shard_map, where the operands are local already) are dropped from them.
      axes: the axes that `fn` may see as manual.

    Do not differentiate through `fn` when it holds sums over shards: replication is not tracked (check_vma=False), so
    give it a custom_vjp outside this call and run both directions through `local`. An all-to-all is safe: its transpose
    is the exchange back, whoever holds what.
    """
    names = frozenset(auto(axes))
    if not names:
        return fn
    return jax.shard_map(
        fn,
        in_specs=_restrict(in_specs, names),
        out_specs=_restrict(out_specs, names),
        axis_names=names,
        check_vma=False,
    )


def _restrict(specs, names: frozenset[str]):
    """The same specs with every axis outside `names` left out."""

    def entry(part):
        if isinstance(part, tuple):
            kept = tuple(name for name in part if name in names)
            return kept if kept else None
        return part if part in names else None

    return jax.tree.map(
        lambda spec: PartitionSpec(*(entry(part) for part in spec)),
        specs,
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )


def manual(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of `axes`, in the order given, that are manual here and larger than 1."""
    sizes = mesh_axes(AxisType.Manual)
    return tuple(name for name in axes if name in sizes)


def auto(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of `axes`, in the order given, that are automatic here and larger than 1: what `local` will open."""
    sizes = mesh_axes(AxisType.Auto)
    return tuple(name for name in axes if name in sizes)


def auto_size(axes: Sequence[str]) -> int:
    """Product of the sizes of those of `axes` that are automatic here (1 without a mesh)."""
    sizes = mesh_axes(AxisType.Auto)
    return math.prod(sizes.get(name, 1) for name in axes)


def axis_size(axes: Sequence[str]) -> int:
    """Number of shards along `axes` as manual axes (1 where they are absent)."""
    sizes = mesh_axes(AxisType.Manual)
    return math.prod(sizes.get(name, 1) for name in axes)


def axis_index(axes: Sequence[str]) -> jax.Array:
    """This shard's place along `axes` taken as one axis, the first varying slowest; int32, 0 where they are absent."""
    names = manual(axes)
    return jax.lax.axis_index(names) if names else jnp.int32(0)


def next_column(x, axes: Sequence[str]):
    """x [B, T, ...] with every column in the place of the one before it; the last is 0.

    T is divided over the manual ones of `axes`: a shard's last column is the first one of the next shard.
    """
    names = manual(axes)
    following = jnp.zeros_like(x[:, :1])
    if names:
        # Not a permutation, which in a pipeline would wait for devices that run another stage.
        firsts = jax.lax.all_gather(x[:, :1], names, axis=1, tiled=True)
        columns = jnp.concatenate([firsts, following], axis=1)
        following = jax.lax.dynamic_slice_in_dim(columns, axis_index(names) + 1, 1, axis=1)
    return jnp.concatenate([x[:, 1:], following], axis=1)


def psum(tree, axes: Sequence[str]):
    """Sum of every leaf over the manual ones of `axes`; the identity where there are none."""
    names = manual(axes)
    return jax.lax.psum(tree, names) if names else tree


def pmax(tree, axes: Sequence[str]):
    """Maximum of every leaf over the manual ones of `axes`; the identity where there are none."""
    names = manual(axes)
    return jax.lax.pmax(tree, names) if names else tree


def pmin(tree, axes: Sequence[str]):
    """Minimum of every leaf over the manual ones of `axes`; the identity where there are none."""
    names = manual(axes)
    return jax.lax.pmin(tree, names) if names else tree
