"""Products of rows that are sorted by group, each group with a kernel of its own: the experts of a mixture.

    y[i] = x[i] @ kernels[group of i].T

The work is that of one product with x's rows (Gale et al., MegaBlocks, 2022, arXiv:2211.15841, section 3, is the idea),
and only the kernels of groups that have rows are read. XLA's own `lax.ragged_dot` takes as many times that as there are
groups on CPU and GPU. Nothing here knows a mesh: a layer calls it on local rows.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jpt.kernels.hopper import reason_not_hopper
from jpt.kernels.local import platform

IMPLEMENTATIONS = ('auto', 'tiles', 'mosaic', 'ragged', 'dense')
# What a forward product is called, for remat policies: those that look for products find none in a loop or kernel.
PRODUCT = 'grouped_matmul'
STEP = 64  # both widths must be multiples for them: the depth of one step, a swizzled line of shared memory


def grouped_matmul(x_MK, kernels_EOK, sizes_E, *, implementation: str = 'auto'):
    """Multiplies rows by the kernel of their group: x [M, K], kernels [E, O, K] -> y [M, O] in x's dtype.

    Group e owns the `sizes_E[e]` (int32) rows that follow those of group e - 1; any group may be empty, and the sum is
    at most M. Rows beyond the sum give 0, and whatever x holds there reaches neither the result nor a gradient.
    Products are taken in x's dtype and accumulated in at least float32; so is the kernels' gradient, which is rounded
    once, to their own dtype.

    Args:
      implementation: 'tiles' (a loop over short runs of rows of one group), 'mosaic' (Hopper's tensor cores), 'ragged'
        (XLA's `lax.ragged_dot`), 'dense' (the reference, E times the work), or 'auto', see `choose_implementation`.

    Raises:
      ValueError: an unknown name, shapes that do not belong together, or an implementation that cannot be used here.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ', '.join(IMPLEMENTATIONS)
        raise ValueError(f'grouped_matmul: implementation={implementation!r}: expected one of {known}')
    shapes = x_MK.shape, kernels_EOK.shape, sizes_E.shape
    if [len(shape) for shape in shapes] != [2, 3, 1] or shapes[0][1] != shapes[1][2] or shapes[1][0] != shapes[2][0]:
        raise ValueError(f'grouped_matmul: shapes {shapes}: expected [M, K], [E, O, K] and [E]')
    if implementation == 'mosaic' and (refused := refusal(x_MK, kernels_EOK)):
        raise ValueError(f"grouped_matmul: implementation='mosaic' cannot be used: {refused}")
    if implementation == 'auto':
        implementation = choose_implementation(x_MK, kernels_EOK)
    return _grouped(implementation, x_MK, kernels_EOK, sizes_E)


def choose_implementation(x_MK, kernels_EOK) -> str:
    """What 'auto' stands for: 'mosaic' where it can be used (bfloat16 on Hopper, even widths), else 'tiles'."""
    return 'tiles' if refusal(x_MK, kernels_EOK) else 'mosaic'


def refusal(x_MK, kernels_EOK) -> str | None:
    """Why 'mosaic' cannot be used here, or None where it can: the one place that says when."""
    _, O, K = kernels_EOK.shape
    reasons = {
        f'the dtype is {x_MK.dtype}, not bfloat16 or float16': x_MK.dtype not in (jnp.bfloat16, jnp.float16),
        f'the widths {O} and {K} are not both multiples of {STEP}': bool(O % STEP or K % STEP),
        'there are no rows': not x_MK.shape[0],
    }
    return reason_not_hopper() or next((reason for reason, holds in reasons.items() if holds), None)


def choose_tile(M: int, E: int) -> int:
    """Rows that 'tiles' takes at a time: about those of a group, a power of 2 from 4 to 128 (to 512 on a GPU).

    A short tile copies its kernel too often and a long one multiplies rows of the next group in vain; measured on CPU,
    benchmarks/results/grouped_matmul.md. On a GPU a turn of the loop costs more than the rows do.
    """
    mean = M // E
    if platform() == 'gpu':
        return 1 << max(4, min(9, mean.bit_length()))
    return 1 << max(2, min(6, mean.bit_length() - 1)) if mean < 256 else 128


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation: str, x_MK, kernels_EOK, sizes_E):
    return _rows(implementation, x_MK, kernels_EOK, sizes_E, True)


def _grouped_fwd(implementation: str, x_MK, kernels_EOK, sizes_E):
    # Not _grouped: a remat policy would not see the name.
    y_MO = checkpoint_name(_rows(implementation, x_MK, kernels_EOK, sizes_E, True), PRODUCT)
    return y_MO, (x_MK, kernels_EOK, sizes_E)


def _grouped_bwd(implementation: str, residuals, dy_MO):
    x_MK, kernels_EOK, sizes_E = residuals
    dx_MK = _rows(implementation, dy_MO, kernels_EOK, sizes_E, False)
    return dx_MK, _per_group(implementation, dy_MO, x_MK, sizes_E, kernels_EOK.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _rows(implementation: str, x_MK, kernels, sizes_E, out_first: bool):
    """Every row times the kernel of its group, [E, out, in] or (for the gradient of x) [E, in, out]."""
    if implementation == 'tiles':
        return _tiles_rows(x_MK, kernels, sizes_E, out_first)
    kernels = kernels.astype(x_MK.dtype)
    if implementation == 'mosaic':
        from jpt.kernels.mosaic_grouped import rows_product  # Pallas: not loaded where it is not used

        return rows_product(x_MK, kernels, sizes_E, out_first=out_first)
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)
    kernels_EIO = kernels.swapaxes(1, 2) if out_first else kernels
    if implementation == 'ragged':
        x_MK = _only_owned(x_MK, sizes_E)
        y_MO = lax.ragged_dot(x_MK, kernels_EIO, sizes_E, preferred_element_type=wide)
        return _only_owned(y_MO, sizes_E).astype(x_MK.dtype)
    x_EMK = _by_group(x_MK, sizes_E)
    return jnp.einsum('emi,eio->mo', x_EMK, kernels_EIO, preferred_element_type=wide).astype(x_MK.dtype)


def _per_group(implementation: str, dy_MO, x_MK, sizes_E, dtype):
    """dy^T x of the rows of every group: [E, O, K] in `dtype`."""
    if implementation == 'tiles':
        return _tiles_per_group(dy_MO, x_MK, sizes_E).astype(dtype)
    if implementation == 'mosaic':
        from jpt.kernels.mosaic_grouped import group_product

        return group_product(dy_MO, x_MK, sizes_E, dtype)
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)
    if implementation == 'ragged':
        rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        dy_MO, x_MK = _only_owned(dy_MO, sizes_E), _only_owned(x_MK, sizes_E)
        return lax.ragged_dot_general(dy_MO, x_MK, sizes_E, rows, preferred_element_type=wide).astype(dtype)
    dy_EMO, x_EMK = _by_group(dy_MO, sizes_E), _by_group(x_MK, sizes_E)
    return jnp.einsum('emo,emk->eok', dy_EMO, x_EMK, preferred_element_type=wide).astype(dtype)


def _only_owned(x_MK, sizes_E):
    """x with zeros in the rows that belong to no group."""
    return jnp.where((jnp.arange(x_MK.shape[0]) < jnp.sum(sizes_E))[:, None], x_MK, 0)


def _by_group(x_MK, sizes_E):
    """[E, M, K]: for every group all rows, with zeros in those that are not its own."""
    ends_E1 = jnp.cumsum(sizes_E)[:, None]
    rows_1M = jnp.arange(x_MK.shape[0])[None]
    mine_EM = (rows_1M < ends_E1) & (rows_1M >= ends_E1 - sizes_E[:, None])
    return jnp.where(mine_EM[..., None], x_MK[None], 0)


class _Tiles(NamedTuple):
    """Runs of rows of one group each, in order: arrays of a static length of which the first `total` are real."""

    total: jax.Array  # []
    group: jax.Array  # [tiles]
    row: jax.Array  # [tiles] the first
    end: jax.Array  # [tiles] where the group ends, which may be inside the tile


def _cut(sizes_E, M: int, tile: int) -> _Tiles:
    """Every group cut into tiles from its first row on: at most M // tile + E of them."""
    E = sizes_E.shape[0]
    ends = jnp.cumsum(sizes_E, dtype=jnp.int32)
    tiles = -(-sizes_E // tile)
    until = jnp.cumsum(tiles, dtype=jnp.int32)
    index = jnp.arange(M // tile + E, dtype=jnp.int32)
    group = jnp.searchsorted(until, index, side='right', method='compare_all').astype(jnp.int32)
    group = jnp.minimum(group, E - 1)
    row = (ends - sizes_E)[group] + (index - (until - tiles)[group]) * tile
    return _Tiles(until[-1], group, row, ends[group])


def _as_bits(dtype) -> bool:
    """Whether a loop holds arrays of this dtype as their bits: bfloat16 on CPU.

    XLA there has no bfloat16 slices before jax 0.12: all of an array is made float32 before the loop, and the array
    that the loop writes to in every turn anew.
    """
    return dtype == jnp.bfloat16 and platform() == 'cpu'


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.uint16) if _as_bits(x.dtype) else x


def _values(bits, dtype):
    """A piece of `_bits(x)` as x's values; `dtype` is that of x."""
    return lax.bitcast_convert_type(bits, dtype) if _as_bits(dtype) else bits


def _kernel(kernels, groups, index):
    """kernels[groups[index]] inside a loop over `index`."""
    if _as_bits(kernels.dtype):
        # Else XLA takes the bits before the loop, a copy of all kernels.
        kernels, index = lax.optimization_barrier((kernels, index))
    return _values(lax.dynamic_index_in_dim(_bits(kernels), groups[index], keepdims=False), kernels.dtype)


def _tiles_rows(x_MK, kernels, sizes_E, out_first: bool):
    """One tile after the other, in order: what a tile writes past the end of its group the next one overwrites."""
    M = x_MK.shape[0]
    tile = choose_tile(M, kernels.shape[0])
    cut = _cut(sizes_E, M, tile)
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)
    padded = jnp.pad(_bits(x_MK), ((0, tile), (0, 0)))
    contract = ((1,), (1 if out_first else 0,)), ((), ())

    def one_tile(index, y):
        rows = _values(lax.dynamic_slice_in_dim(padded, cut.row[index], tile), x_MK.dtype)
        kernel = _kernel(kernels, cut.group, index).astype(x_MK.dtype)
        product = lax.dot_general(rows, kernel, contract, preferred_element_type=wide)
        return lax.dynamic_update_slice_in_dim(y, _bits(product.astype(x_MK.dtype)), cut.row[index], 0)

    nothing = jnp.zeros((M + tile, kernels.shape[1 if out_first else 2]), padded.dtype)
    y_MO = _only_owned(lax.fori_loop(0, cut.total, one_tile, nothing)[:M], sizes_E)
    return _values(y_MO, x_MK.dtype)


def _tiles_per_group(dy_MO, x_MK, sizes_E):
    """Adds dy^T x of tile after tile to the sum of its group: [E, O, K] in at least float32."""
    (M, K), O, E = x_MK.shape, dy_MO.shape[1], sizes_E.shape[0]
    tile = choose_tile(M, E)
    cut = _cut(sizes_E, M, tile)
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)
    operands = [jnp.pad(_bits(operand), ((0, tile), (0, 0))) for operand in (dy_MO, x_MK)]

    def one_tile(index, sums):
        row = cut.row[index]
        own = (row + jnp.arange(tile) < cut.end[index])[:, None]
        pieces = [jnp.where(own, lax.dynamic_slice_in_dim(operand, row, tile), 0) for operand in operands]
        dy, x = (_values(piece, x_MK.dtype) for piece in pieces)
        product = lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        # Not sums.at[group].add: a scatter, which takes a tenth longer on CPU.
        sum_before = lax.dynamic_index_in_dim(sums, cut.group[index], keepdims=False)
        return lax.dynamic_update_index_in_dim(sums, sum_before + product, cut.group[index], 0)

    return lax.fori_loop(0, cut.total, one_tile, jnp.zeros((E, O, K), wide))
