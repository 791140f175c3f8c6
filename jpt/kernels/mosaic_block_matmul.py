"""Blockwise FP8 products on Hopper's tensor cores; block_matmul.py says what they compute.

Blocks of three warpgroups stay for the whole product and take one tile of the result after the other. One warpgroup
loads, several steps of 128 columns of K ahead and on into the next tile; two multiply. A tensor core adds up one step
only: the warpgroup then multiplies that sum with both scales and adds it to its own float32 sum, in registers, while
the tensor cores work on its next step or on one of the other warpgroup. Where b has a scale per row, these are loaded
as those of a are.
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

from jpt.kernels.block_matmul import by_rows
from jpt.kernels.block_tiles import BLOCK, Tile, choose_tile
from jpt.kernels.hopper import multiprocessors, swizzled
from jpt.kernels.low_precision import E4M3

WARPGROUPS = 2  # that multiply; a third one loads
LOADING, MULTIPLYING = 72, 216  # registers of a thread: as many together as the three have at the start
RASTER = 8  # columns of tiles that blocks work on side by side, so that they share what they load
HEIGHT = 64  # rows of one instruction of the tensor cores


def product(a_MK, a_scale, b_NK, b_scale, dtype: Any, *, tile: Tile | None = None, interpret: Any = None):
    """As `block_matmul.block_matmul`, with the tile that is given; interpret: as `plgpu.kernel` takes it."""
    (M, K), N = a_MK.shape, b_NK.shape[0]
    each, blocks = by_rows(b_NK, b_scale), multiprocessors(interpret)
    tile = tile or choose_tile(M, N, blocks)
    rows = pl.cdiv(M, tile.rows)
    a_MK = jnp.pad(a_MK, ((0, -M % 8), (0, 0))) if M % 8 else a_MK
    scale_KM = jnp.pad(a_scale.T, ((0, 0), (0, rows * tile.rows - M)))
    columns = pl.cdiv(N, tile.columns)
    b_scale = jnp.pad(b_scale.T, ((0, 0), (0, columns * tile.columns - N))) if each else b_scale
    kernel = plgpu.kernel(
        partial(_body, tile, each),
        out_type=jax.ShapeDtypeStruct((a_MK.shape[0], N), dtype),
        grid=(min(rows * columns, blocks),),
        grid_names=('block',),
        num_threads=WARPGROUPS + 1,
        thread_name='wg',
        scratch_types=[*buffers(tile, K, each), out_buffer(tile, N, dtype)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(a_MK, scale_KM, b_NK, b_scale)[:M]


def buffers(tile: Tile, K: int, each: bool = False) -> list[Any]:
    """Shared memory for the steps in flight: a, its scales, b, where `each` row of b has one its scales, a barrier for
    what is loaded, one for what is used.
    """
    more = [plgpu.SMEM((tile.steps, tile.columns), jnp.float32)] if each else []
    return [
        plgpu.SMEM((tile.steps, tile.rows, BLOCK), E4M3, transforms=swizzled(K, E4M3)),
        plgpu.SMEM((tile.steps, tile.rows), jnp.float32),
        plgpu.SMEM((tile.steps, tile.columns, BLOCK), E4M3, transforms=swizzled(K, E4M3)),
        *more,
        plgpu.Barrier(num_arrivals=3 + len(more), num_barriers=tile.steps),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.steps),
    ]


def part_of(tile: Tile) -> tuple[int, int]:
    """Rows and columns of a tile that one of the two warpgroups multiplies: side by side where rows are few."""
    return (tile.rows // WARPGROUPS, tile.columns) if tile.rows >= 128 else (tile.rows, tile.columns // WARPGROUPS)


def out_buffer(tile: Tile, N: int, dtype: Any) -> Any:
    """Shared memory for what a warpgroup sends away: its part, or in float32 half of its columns."""
    (rows, columns), size = part_of(tile), jnp.dtype(dtype).itemsize
    piece = columns * 2 // size
    return plgpu.SMEM((WARPGROUPS, rows, piece), dtype, transforms=swizzled(math.gcd(N, piece), dtype))


def _body(tile: Tile, each: bool, a, a_scale, b, b_scale, y, *scratch):
    """The kernel of `product`; `each` row of b has a scale, [K / 128, N], or 128 of them share one."""
    *ring, out = scratch
    rows, columns = pl.cdiv(y.shape[0], tile.rows), pl.cdiv(y.shape[1], tile.columns)

    def every_tile(work: Callable):
        """Calls work(row, column, step) for every tile of this block; `step` counts steps of K from the first on."""

        @plgpu.nd_loop((rows * columns,), collective_axes='block', init_carry=jnp.int32(0))
        def _(here, carry):
            row, column = plgpu.planar_snake(here.index[0], (rows, columns), 1, RASTER)
            return work(row, column, carry)

    def load(row, column, step):
        return load_steps(tile, ring, a, a_scale, b, row, column, step, b_scale if each else None)

    def multiply(row, column, step):
        b_scale_of = None if each else lambda k: b_scale[lax.div(column * tile.columns, BLOCK), k]
        sums, step = add_up(tile, ring, pl.cdiv(a.shape[1], BLOCK), b_scale_of, step)
        store(tile, sums, out, y, row, column)
        return step

    warpgroups(tile, ring, partial(every_tile, load), partial(every_tile, multiply))


def warpgroups(tile: Tile, ring: list[Any], load: Callable, multiply: Callable) -> None:
    """Gives the third warpgroup load() and the others multiply(), each over all tiles of this block."""
    used = ring[-1]

    def loading():
        plgpu.set_max_registers(LOADING, action='decrease')
        load()
        for slot in range(tile.steps):  # leave no arrival that nobody has waited for
            plgpu.barrier_wait(used.at[slot])

    def multiplying():
        plgpu.set_max_registers(MULTIPLYING, action='increase')
        for slot in range(tile.steps):  # all are free at first
            plgpu.barrier_arrive(used.at[slot])
        multiply()
        plgpu.wait_smem_to_gmem(0)

    lax.cond(lax.axis_index('wg') == WARPGROUPS, loading, multiplying)


def load_steps(tile: Tile, ring: list[Any], a, a_scale, b, row, column, step, b_scale=None, blocks=None):
    """Loads what one tile of the result needs, step by step as room becomes free -> the next step.

    blocks: the first block of K and the one behind the last; None: all.
    """
    a_tiles, scale_tiles, b_tiles, *more, loaded, used = ring
    rows, columns = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)

    def one_step(k, step):
        slot, depth = lax.rem(step, tile.steps), pl.ds(k * BLOCK, BLOCK)
        plgpu.barrier_wait(used.at[slot])
        plgpu.copy_gmem_to_smem(a.at[rows, depth], a_tiles.at[slot], loaded.at[slot])
        plgpu.copy_gmem_to_smem(b.at[columns, depth], b_tiles.at[slot], loaded.at[slot])
        plgpu.copy_gmem_to_smem(a_scale.at[k, rows], scale_tiles.at[slot], loaded.at[slot])
        for b_scale_tiles in more:
            plgpu.copy_gmem_to_smem(b_scale.at[k, columns], b_scale_tiles.at[slot], loaded.at[slot])
        return step + 1

    begin, end = blocks or (0, pl.cdiv(a.shape[1], BLOCK))
    return lax.fori_loop(begin, end, one_step, step)


def add_up(tile: Tile, ring: list[Any], depth: Any, b_scale_of: Callable | None, step):
    """This warpgroup's part of a tile of the result, in float32, 64 rows to an array -> the arrays and the next step.

    With 64 rows and an even number of steps, two are multiplied at a time: the first sum is scaled and added while the
    tensor cores work on the second. Else it is the other warpgroup that they work for in the meantime: with 128 rows
    registers hold no more than one sum beside the part itself, and a step that is left over would need its own code.
    Nor do they where every row of b has a scale: b_scale_of is None then, and the ring has the scales; the number of
    steps, `depth`, may then be known in the kernel alone.
    """
    part = _Part(tile, ring)
    together = 2 if b_scale_of and part.count == 1 and depth % 2 == 0 else 1

    def steps(at, carry):
        sums, step = carry
        # First: their way is long.
        factors = [b_scale_of(together * at + further) if b_scale_of else None for further in range(together)]
        slots = [lax.rem(step + further, tile.steps) for further in range(together)]
        return (part.side_by_side if part.count == 1 else part.one_by_one)(slots, factors, sums), step + together

    nothing = plgpu.layout_cast(jnp.zeros(part.shape, jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, depth // together, steps, ((nothing,) * part.count, step))


class _Part:
    """What one warpgroup multiplies of a tile: `count` times 64 rows."""

    def __init__(self, tile: Tile, ring: list[Any]):
        (rows, width), side = part_of(tile), lax.axis_index('wg')
        self.ring, self.count, self.shape = ring, rows // HEIGHT, (HEIGHT, width)
        self.top = side * rows if tile.rows > rows else 0
        self.left = side * width if tile.columns > width else 0

    def begin(self, acc, slot, at: int):
        """Starts the product of 64 rows in one step."""
        a_tiles, _, b_tiles, *_ = self.ring
        rows, columns = pl.ds(self.top + at * HEIGHT, HEIGHT), pl.ds(self.left, self.shape[1])
        plgpu.wgmma(acc, a_tiles.at[slot, rows], b_tiles.at[slot, columns].T)

    def scale_of(self, slot, at: int, factor):
        """What that product is multiplied by."""
        scale = self.ring[1][slot, pl.ds(self.top + at * HEIGHT, HEIGHT)]
        if factor is not None:
            return lax.broadcast_in_dim(scale * factor, self.shape, (0,))
        own = self.ring[3][slot, pl.ds(self.left, self.shape[1])]
        return lax.broadcast_in_dim(scale, self.shape, (0,)) * lax.broadcast_in_dim(own, self.shape, (1,))

    def side_by_side(self, slots, factors, sums):
        """Several steps of the same 64 rows, all begun before the first is waited for."""
        *_, loaded, used = self.ring

        def scope(*accs):
            total = sums[0]
            for acc, slot in zip(accs, slots, strict=True):
                plgpu.barrier_wait(loaded.at[slot])
                self.begin(acc, slot, 0)
            scales = [self.scale_of(slot, 0, factor) for slot, factor in zip(slots, factors, strict=True)]
            plgpu.commit_smem()  # scales are read before the copy engine writes anew; the tensor cores are at work
            for at, (acc, slot, scale) in enumerate(zip(accs, slots, scales, strict=True)):
                found = plgpu.wgmma_accumulator_load(acc, wait_n=len(slots) - 1 - at)
                plgpu.barrier_arrive(used.at[slot])
                total += found * scale
            return (total,)

        return pl.run_scoped(scope, *[plgpu.ACC(self.shape)] * len(slots))

    def one_by_one(self, slots, factors, sums):
        """One step of all rows, 64 after 64."""
        (slot,), (factor,), totals = slots, factors, []
        *_, loaded, used = self.ring
        plgpu.barrier_wait(loaded.at[slot])
        for at, total in enumerate(sums):

            def scope(acc, at=at):
                self.begin(acc, slot, at)
                scale = self.scale_of(slot, at, factor)
                if at == self.count - 1:
                    plgpu.commit_smem()
                return plgpu.wgmma_accumulator_load(acc, wait_n=0), scale

            found, scale = pl.run_scoped(scope, plgpu.ACC(self.shape))
            if at == self.count - 1:
                plgpu.barrier_arrive(used.at[slot])
            totals.append(total + found * scale)
        return tuple(totals)


def store(tile: Tile, sums, out, y, row, column) -> None:
    """Sends this warpgroup's part of a tile to the result; what is outside of it is cut off."""
    (rows, width), side, piece = part_of(tile), lax.axis_index('wg'), out.shape[-1]
    top = row * tile.rows + (side * rows if tile.rows > rows else 0)
    left = column * tile.columns + (side * width if tile.columns > width else 0)
    for begin in range(0, width, piece):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for at, sum_ in enumerate(sums):
            out[side, pl.ds(at * HEIGHT, HEIGHT)] = sum_[:, begin : begin + piece].astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[side], y.at[pl.ds(top, rows), pl.ds(left + begin, piece)])
