"""Rounding to E4M3 with a scale per row and 128 columns on Hopper in one pass; block_quantize.py says what is computed.

A block walks over tiles of 64 rows and 128 columns: the copy engine brings several of them ahead, one warpgroup finds
the largest magnitude of every row, divides, and hands codes and scales back to the copy engine. Scales lie in memory
with rows as neighbours, as the products that read them want them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpt.kernels.block_quantize import COLUMNS, scale_of
from jpt.kernels.hopper import multiprocessors, swizzled
from jpt.kernels.low_precision import E4M3, exact_divide

ROWS = 64
BLOCKS = 3  # at most, that share a multiprocessor
IN_FLIGHT = 48 * 1024  # bytes of tiles that a block is ahead, two tiles at least
SHARED = 232_448  # bytes of shared memory that blocks on one multiprocessor can have, and
OTHER = 20 * 1024  # what one needs beside the tiles in flight


def quantize(
    *inputs_MK,
    produce: Callable[..., jax.Array] | None = None,
    row_factor=None,
    column_factor=None,
    scale: str = 'float32',
    interpret: Any = None,
):
    """Arrays [M, K] of one shape and dtype -> codes (e4m3 [M, K]) and scales (float32 [M, ceil(K / 128)]).

    Args:
      produce: makes the float32 tile to quantize of a tile of each input; left out, that of the only one is taken.
      row_factor, column_factor: both or none; float32 [M] and [K] that it is multiplied by.
      interpret: as `plgpu.kernel` takes it.
    """
    (M, K), whole = inputs_MK[0].shape, -inputs_MK[0].shape[0] % 8
    inputs_MK = tuple(jnp.pad(array, ((0, whole), (0, 0))) for array in inputs_MK) if whole else inputs_MK
    rows, columns = pl.cdiv(M, ROWS), pl.cdiv(K, COLUMNS)
    tile_bytes = len(inputs_MK) * ROWS * COLUMNS * inputs_MK[0].dtype.itemsize
    steps = max(2, IN_FLIGHT // tile_bytes)
    blocks = min(BLOCKS, SHARED // (steps * tile_bytes + OTHER)) * multiprocessors(interpret)
    factors = () if row_factor is None else (_padded(row_factor, ROWS), _padded(column_factor, COLUMNS))
    out_types = jax.ShapeDtypeStruct((M + whole, K), E4M3), jax.ShapeDtypeStruct((columns, rows * ROWS), jnp.float32)
    kernel = plgpu.kernel(
        partial(_body, len(inputs_MK), steps, produce or _wide, scale),
        out_type=out_types,
        grid=(min(rows * columns, blocks),),
        grid_names=('block',),
        scratch_types=[
            plgpu.SMEM((2, ROWS, COLUMNS), E4M3, transforms=swizzled(K, E4M3)),
            plgpu.SMEM((2, ROWS), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    codes_MK, scales_CM = kernel(*inputs_MK, *factors)
    return codes_MK[:M], scales_CM[:, :M].T


def _wide(tile):
    return tile.astype(jnp.float32)


def _padded(vector, multiple: int):
    """float32, with zeros up to a multiple: copies of one axis are not cut off where the array ends."""
    return jnp.pad(vector.astype(jnp.float32), (0, -vector.shape[0] % multiple))


def _body(count: int, ahead: int, produce: Callable, scale: str, *refs):
    """The kernel: inputs [M, K], perhaps two factors, codes, scales [K / 128, M], and two buffers each for both."""
    inputs, factors, (codes, scales, code_tiles, scale_tiles) = refs[:count], refs[count:-4], refs[-4:]
    M, K = codes.shape
    columns, rows = pl.cdiv(K, COLUMNS), pl.cdiv(M, ROWS)
    block, blocks = lax.axis_index('block'), lax.axis_size('block')

    def place(step):
        """Row and column of the tile that is this block's in a step."""
        tile = block + step * blocks
        return lax.div(tile, columns), lax.rem(tile, columns)

    def quantize_tile(indices, *tiles):
        """One step of the pipeline: a tile of inputs to codes and scales, and these on their way to memory."""
        (step,) = indices
        row, column = place(step)
        numbers = produce(*(tile[...] for tile in tiles[:count]))
        numbers = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA_UPCAST_2X)  # four neighbours to a thread
        if factors:
            row_factor, column_factor = (tile[...] for tile in tiles[count:])
            numbers *= lax.broadcast_in_dim(row_factor, numbers.shape, (0,))
            numbers *= lax.broadcast_in_dim(column_factor, numbers.shape, (1,))
        if (produce is not _wide or factors) and inputs[0].dtype != jnp.float32:  # as the array that is never written
            numbers = numbers.astype(inputs[0].dtype).astype(jnp.float32)
        found = scale_of(jnp.max(jnp.abs(numbers), axis=1), scale)
        slot = lax.rem(step, 2)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the copies of the tile before the last have left
        code_tiles[slot] = exact_divide(numbers, lax.broadcast_in_dim(found, numbers.shape, (0,))).astype(E4M3)
        scale_tiles[slot] = found
        plgpu.commit_smem()
        whole = pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)
        plgpu.copy_smem_to_gmem(code_tiles.at[slot], codes.at[whole], commit_group=False)
        plgpu.copy_smem_to_gmem(scale_tiles.at[slot], scales.at[column, pl.ds(row * ROWS, ROWS)])

    def tile_of(dtype):
        return plgpu.BlockSpec((ROWS, COLUMNS), lambda step: place(step), transforms=swizzled(K, dtype))

    specs = [tile_of(array.dtype) for array in inputs]
    if factors:
        specs += [plgpu.BlockSpec((ROWS,), lambda step: place(step)[:1])]
        specs += [plgpu.BlockSpec((COLUMNS,), lambda step: place(step)[1:])]
    steps = lax.div(rows * columns - block + blocks - 1, blocks)
    plgpu.emit_pipeline(quantize_tile, grid=(steps,), in_specs=specs, max_concurrent_steps=ahead)(*inputs, *factors)
    plgpu.wait_smem_to_gmem(0)
