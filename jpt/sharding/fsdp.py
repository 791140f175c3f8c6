"""Weights divided over `fsdp`, gathered where they are used: in the compute dtype; gradients return in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.kernels.local import manual
from jpt.sharding.rules import MESH_AXES, logical_axes, path_keys

AXIS = 'fsdp'
# Parts of a weight that a product reads in the compute dtype; codes and scales of quantized weights keep theirs.
CAST = ('kernel', 'embedding', 'base', 'a', 'b')


def gathering() -> bool:
    """Whether `fsdp` is here an axis along which every device holds a part of the weights."""
    return bool(manual((AXIS,)))


def gather(tree: Any, dtype: DTypeLike | None) -> Any:
    """The whole weights of a tree of local parts: one layer, or what is not in layers. Itself where nothing is divided.

    Which dimension is divided follows from a leaf's path (rules.py). Matrices are cast to `dtype` before they travel
    (None: no cast). The transpose sums all devices' cotangents in at least float32, and scatters them to the parts.
    """
    if not gathering():
        return tree
    return jax.tree_util.tree_map_with_path(functools.partial(_gather_leaf, dtype), tree)


def _gather_leaf(dtype: DTypeLike | None, path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    keys = path_keys(path)
    axes = logical_axes(keys)
    dims = [dim for dim, axis in enumerate(axes) if axis is not None and AXIS in MESH_AXES[axis]]
    if not dims:
        return leaf
    return _gather(leaf, dims[0], leaf.dtype if dtype is None or keys[-1] not in CAST else jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), AXIS, axis=dim, tiled=True)


def _gather_forward(part: jax.Array, dim: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return _gather(part, dim, dtype), jnp.zeros((0,), part.dtype)  # remembers the dtype that the cotangent must have


def _gather_backward(dim: int, dtype: jnp.dtype, empty: jax.Array, whole: jax.Array) -> tuple[jax.Array]:
    wide = whole.astype(jnp.promote_types(dtype, jnp.float32))
    summed = jax.lax.psum_scatter(wide, AXIS, scatter_dimension=dim, tiled=True)
    return (summed.astype(empty.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def keep_activations(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A jax.checkpoint policy for one layer: keep what has batch, length and width; the rest is cheap or a weight.

    A gathered kernel [out, in], and whatever is made of it alone, is thus gathered once more for the backward pass
    instead of being held for every layer.
    """
    del primitive, params
    return max((getattr(operand, 'ndim', 0) for operand in operands), default=0) >= 3
