"""Blockwise FP8 products of grouped rows on Hopper; grouped_block_matmul.py says what they compute.

The machinery of mosaic_block_matmul.py, over runs of rows instead of rows: a run that several groups share is
multiplied once for each of them, and every group stores its own rows (mosaic_grouped.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpt.kernels.block_tiles import BLOCK, Tile, choose_tile
from jpt.kernels.hopper import multiprocessors, swizzled
from jpt.kernels.mosaic_block_matmul import (
    HEIGHT,
    RASTER,
    WARPGROUPS,
    add_up,
    buffers,
    load_steps,
    part_of,
    warpgroups,
)
from jpt.kernels.mosaic_grouped import store_rows, walk

PIECE = 64  # columns that leave at a time


def product(a_MK, a_scale, b_ENK, b_scale, sizes_E, dtype: Any, *, tile: Tile | None = None, interpret: Any = None):
    """As `grouped_block_matmul`, with the tile that is given; interpret: as for `plgpu.kernel`."""
    (M, K), (E, N) = a_MK.shape, b_ENK.shape[:2]
    blocks = multiprocessors(interpret)
    tile = tile or choose_tile(M, N, blocks, groups=E)
    whole = -M % 8
    a_MK = jnp.pad(a_MK, ((0, whole), (0, 0))) if whole else a_MK
    scale_KM = jnp.pad(a_scale.T, ((0, 0), (0, -M % tile.rows)))
    piece = min(part_of(tile)[1], PIECE * 2 // jnp.dtype(dtype).itemsize)
    kernel = plgpu.kernel(
        partial(_body, tile),
        out_type=jax.ShapeDtypeStruct((M + whole, N), dtype),
        grid=(blocks,),
        grid_names=('block',),
        num_threads=WARPGROUPS + 1,
        thread_name='wg',
        scratch_types=[
            *buffers(tile, K),
            plgpu.SMEM((WARPGROUPS, HEIGHT, piece), dtype, transforms=swizzled(math.gcd(N, piece), dtype)),
            plgpu.SMEM((WARPGROUPS, HEIGHT, piece), dtype),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    y_MN = kernel(*walk(sizes_E, M, tile.rows), a_MK, scale_KM, b_ENK, b_scale)[:M]
    # What no block has written is not zero but whatever was there; this joins the reader's own pass over y.
    return jnp.where((jnp.arange(M) < jnp.sum(sizes_E))[:, None], y_MN, 0)


def _body(tile: Tile, total, group, run, start, size, a, a_scale, b, b_scale, y, *scratch):
    """The kernel of `product`; the first five are those of `Walk`."""
    *ring, whole, ragged = scratch
    columns = pl.cdiv(y.shape[1], tile.columns)

    def every_tile(work: Callable):
        """Calls work(index, column, step) for every tile of this block: of which run and group `index` tells."""

        @plgpu.nd_loop((total[0] * columns,), collective_axes='block', init_carry=jnp.int32(0))
        def _(here, carry):
            index, column = plgpu.planar_snake(here.index[0], (total[0], columns), 1, RASTER)
            return work(index, column, carry)

    def load(index, column, step):
        return load_steps(tile, ring, a, a_scale, b.at[group[index]], run[index], column, step)

    def multiply(index, column, step):
        own, block = group[index], lax.div(column * tile.columns, BLOCK)
        sums, step = add_up(tile, ring, pl.cdiv(a.shape[1], BLOCK), lambda k: b_scale[own, block, k], step)
        store(index, column, sums)
        return step

    def store(index, column, sums):
        """This warpgroup's rows of the run that are the group's, 64 after 64 and some columns after others."""
        (height, width), side, piece = part_of(tile), lax.axis_index('wg'), whole.shape[-1]
        top = side * height if tile.rows > height else 0
        left = column * tile.columns + (side * width if tile.columns > width else 0)
        for at, result in enumerate(sums):
            above = top + at * HEIGHT
            first = jnp.clip(start[index] - above, 0, HEIGHT)
            count = jnp.clip(start[index] + size[index] - above, 0, HEIGHT) - first
            rows = run[index] * tile.rows + above, first, count
            for begin in range(0, width, piece):
                target = y.at[:, pl.ds(left + begin, piece)]
                part = result[:, begin : begin + piece].astype(y.dtype)
                store_rows(part, whole.at[side], ragged.at[side], target, *rows)

    warpgroups(tile, ring, partial(every_tile, load), partial(every_tile, multiply))
