"""Blockwise FP8 rounding and products on any mesh: every shard runs the kernel on what it has.

Under automatic axes the compiler would gather the operands of an opaque call. So rows stay where they are, `tensor`
divides the outputs of a layer (its kernel's rows, the product is whole) or its inputs (the shards' products, float32,
are summed over `tensor` and rounded once), and whatever else divides a weight, `fsdp`, is gathered before the product.
What a shard rounds is what one device would: codes, scales and the numbers they stand for do not depend on the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.block_matmul import block_matmul
from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.grouped_block_matmul import grouped_block_matmul
from jpt.kernels.local import auto, auto_size, local, mesh_axes, psum
from jpt.kernels.parallel_attention import ROWS, SEQUENCE
from jpt.kernels.weight_only_matmul import weight_only_matmul

TENSOR = 'tensor'


class Pieces(NamedTuple):
    """Of how many pieces, heads or channels, a linear layer's outputs and inputs are made, which a mesh divides.

    0: they are whole on every device. Outputs and inputs are not divided at once.
    """

    out: int = 0
    inner: int = 0


class Lies(NamedTuple):
    """How the operands of a product x [..., in] by [out, in] lie over the automatic axes of the mesh."""

    lead: tuple[tuple[str, ...] | None, ...]  # of the axes of x before the last
    out: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()  # all automatic axes: on those that divide nothing every shard does the same

    @property
    def inputs(self) -> P:
        return P(*self.lead, self.inner or None)

    @property
    def outputs(self) -> P:
        return P(*self.lead, self.out or None)

    @property
    def weight(self) -> P:
        return P(self.out or None, self.inner or None)

    def rows(self, shape: Sequence[int]) -> int:
        """How many rows a shard has of x of this shape."""
        return math.prod(shape[:-1]) // auto_size([name for entry in self.lead for name in entry or ()])


def whole(ndim: int) -> Lies:
    """Every device has all of x, which has so many axes, and of the weight."""
    return Lies((None,) * (ndim - 1), axes=tuple(mesh_axes(AxisType.Auto)))


def lies(shape: Sequence[int], pieces: Pieces | None) -> Lies | None:
    """How x of this shape, [B, in] or [B, T, ..., in], and a weight lie; None: nobody says it, and there is a mesh.

    Rows and sequence are divided where the mesh divides them evenly; so are pieces, and layers with another number of
    them are whole on every device of `tensor`, see `REPLICABLE` in jpt/sharding/rules.py.
    """
    here = whole(len(shape))
    if pieces is None or not here.axes:
        return None if here.axes else here
    lead = list(here.lead)
    for at, names in enumerate((ROWS, (SEQUENCE,))):
        if at < len(lead) and shape[at] % auto_size(names) == 0:
            lead[at] = auto(names) or None
    out, inner = (auto([TENSOR]) if count and count % auto_size([TENSOR]) == 0 else () for count in pieces)
    return Lies(tuple(lead), out, inner, here.axes)


def cut(where: Lies, out: int, inner: int) -> str | None:
    """Why a weight [out, in] has no product on shards alone, or None: a shard would hold a part of a block."""
    for name, size, axes in (('outputs', out, where.out), ('inputs', inner, where.inner)):
        ways = auto_size(axes)
        if ways > 1 and size % (ways * BLOCK):
            return f'{size} {name} on {ways} shards are not whole blocks of {BLOCK}'
    return None


def rounded(make: Callable[..., Any], rows: Sequence[Any], where: Lies, vector: Any = None) -> tuple[Any, Any]:
    """Codes [..., in] and scales [..., in / 128] as `make` makes them of arrays [..., in] and a vector [in]."""
    given = (*rows, *(() if vector is None else (vector,)))
    specs = (*(where.inputs for _ in rows), *(() if vector is None else (P(where.inner or None),)))
    return local(make, specs, (where.inputs, where.inputs), where.axes)(*given)


def block_product(codes, scales, b_NK, b_scale, dtype: Any, where: Lies):
    """`block_matmul` of codes [..., in] and scales [..., in / 128] by a weight [out, in]: [..., out] in `dtype`."""

    def here(codes, scales, b_NK, b_scale):
        a_MK, a_scale = (part.reshape(-1, part.shape[-1]) for part in (codes, scales))
        y_MN = block_matmul(a_MK, a_scale, b_NK, b_scale, jnp.float32 if where.inner else dtype)
        return psum(y_MN, where.inner).astype(dtype).reshape(*codes.shape[:-1], -1)

    specs = where.inputs, where.inputs, where.weight, where.weight
    return local(here, specs, where.outputs, where.axes)(codes, scales, b_NK, b_scale)


def weight_only_product(x, b_NK, b_scale, where: Lies):
    """`weight_only_matmul` of x [..., in] by a weight [out, in]: [..., out] in the dtype of x."""

    def here(x, b_NK, b_scale):
        y_MN = weight_only_matmul(x.reshape(-1, x.shape[-1]), b_NK, b_scale, jnp.float32 if where.inner else x.dtype)
        return psum(y_MN, where.inner).astype(x.dtype).reshape(*x.shape[:-1], -1)

    return local(here, (where.inputs, where.weight, where.weight), where.outputs, where.axes)(x, b_NK, b_scale)


def grouped_block_product(codes_MK, scales, b_ENK, b_scale, sizes_E, dtype: Any):
    """`grouped_block_matmul`; what the mixture's own shard_map has not divided, all devices compute alike."""

    def here(codes_MK, scales, b_ENK, b_scale, sizes_E):
        return grouped_block_matmul(codes_MK, scales, b_ENK, b_scale, sizes_E, dtype)

    return local(here, P(), P(), tuple(mesh_axes(AxisType.Auto)))(codes_MK, scales, b_ENK, b_scale, sizes_E)
