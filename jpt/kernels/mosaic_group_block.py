"""Blockwise FP8 products of the rows of each group on Hopper; group_block_product.py says what they compute.

The machinery of mosaic_block_matmul.py with a scale for every row of both operands, once for each group: a tile of the
result adds up the runs of its group alone, of which there may be none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpt.kernels.block_tiles import Tile, choose_tile
from jpt.kernels.hopper import multiprocessors
from jpt.kernels.mosaic_block_matmul import (
    RASTER,
    WARPGROUPS,
    add_up,
    buffers,
    load_steps,
    out_buffer,
    store,
    warpgroups,
)


def product(a_OR, a_scale, b_KR, b_scale, runs_E, *, tile: Tile | None = None, interpret: Any = None):
    """As `group_block_product`, with the tile that is given; interpret: as `plgpu.kernel` takes it."""
    (O, R), K, (E,) = a_OR.shape, b_KR.shape[0], runs_E.shape
    blocks = multiprocessors(interpret)
    tile = tile or choose_tile(E * O, K, blocks)  # as if tiles went on from group to group: they do where they divide O
    a_OR = jnp.pad(a_OR, ((0, -O % 8), (0, 0)))
    a_scale = jnp.pad(a_scale.T, ((0, 0), (0, -O % tile.rows)))
    b_scale = jnp.pad(b_scale.T, ((0, 0), (0, -K % tile.columns)))
    ends_E = jnp.cumsum(runs_E, dtype=jnp.int32)
    kernel = plgpu.kernel(
        partial(_body, tile),
        out_type=jax.ShapeDtypeStruct((E, a_OR.shape[0], K), jnp.float32),
        grid=(blocks,),
        grid_names=('block',),
        num_threads=WARPGROUPS + 1,
        thread_name='wg',
        scratch_types=[*buffers(tile, R, each=True), out_buffer(tile, K, jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(ends_E - runs_E, ends_E, a_OR, a_scale, b_KR, b_scale)[:, :O]


def _body(tile: Tile, starts, ends, a, a_scale, b, b_scale, y, *scratch):
    """The kernel of `product`: runs starts[e] ... ends[e] - 1 are of group e."""
    *ring, out = scratch
    groups, rows, columns = y.shape[0], pl.cdiv(y.shape[1], tile.rows), pl.cdiv(y.shape[2], tile.columns)

    def every_tile(work: Callable):
        """Calls work(group, row, column, step) for every tile of this block; `step` counts steps from the first on."""

        @plgpu.nd_loop((groups, rows * columns), collective_axes='block', init_carry=jnp.int32(0))
        def _(here, carry):
            row, column = plgpu.planar_snake(here.index[1], (rows, columns), 1, RASTER)
            return work(here.index[0], row, column, carry)

    def load(group, row, column, step):
        return load_steps(tile, ring, a, a_scale, b, row, column, step, b_scale, (starts[group], ends[group]))

    def multiply(group, row, column, step):
        sums, step = add_up(tile, ring, ends[group] - starts[group], None, step)
        store(tile, sums, out, y.at[group], row, column)
        return step

    warpgroups(tile, ring, partial(every_tile, load), partial(every_tile, multiply))
