"""Grouped products on Hopper's tensor cores: rows times the kernel of their group, and one product of rows per group.

Written for Mosaic GPU (`plgpu.kernel`). JAX ships kernels for the same two products; these differ in what a layer of
many experts needs: the rows that a block works on are looked up in arrays instead of being found by a walk over all
groups in every block, what lies outside a group is left out rather than multiplied by zero (NaN there stays there), and
the product per group leaves in the dtype asked for. grouped_matmul.py says where they serve, and differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpt.kernels.hopper import multiprocessors

LINE = 128  # bytes: the longest row that shared memory is swizzled in


class Tile(NamedTuple):
    """What one warpgroup holds of the result, how deep one step of the sum is, and how many steps are in flight."""

    rows: int
    columns: int
    steps: int
    depth: int = 64


class Walk(NamedTuple):
    """The runs of rows that have work, in order: arrays of a static length of which the first `total` are real."""

    total: jax.Array  # [1]
    group: jax.Array  # [runs] whose kernel
    run: jax.Array  # [runs] which run, all of the same length, counted from row 0
    start: jax.Array  # [runs] the first row of this group in the run, counted from the run's
    size: jax.Array  # [runs] how many there are


def walk(sizes_E: jax.Array, M: int, rows: int) -> Walk:
    """Cuts M rows into runs and names every pair of a run and a group that meet: at most ceil(M / rows) + E - 1."""
    E = sizes_E.shape[0]
    ends = jnp.cumsum(sizes_E, dtype=jnp.int32)
    starts = ends - sizes_E
    first = starts // rows
    runs = jnp.where(sizes_E > 0, (ends - 1) // rows - first + 1, 0)
    until = jnp.cumsum(runs, dtype=jnp.int32)
    index = jnp.arange(-(-M // rows) + E - 1, dtype=jnp.int32)
    group = jnp.searchsorted(until, index, side='right', method='compare_all').astype(jnp.int32)
    group = jnp.minimum(group, E - 1)
    run = first[group] + index - (until - runs)[group]
    start = jnp.maximum(starts[group] - run * rows, 0)
    size = jnp.minimum(ends[group] - run * rows, rows) - start
    return Walk(until[-1:], group, run, start, size)


def rows_product(x_MK, kernels, sizes_E, *, out_first: bool, interpret: Any = None):
    """x [M, K] times the kernel of each row's group -> [M, O] in x's dtype; rows of no group are 0.

    Args:
      kernels: in x's dtype (bfloat16 or float16), [E, O, K] with `out_first`, else [E, K, O]; K and O multiples of 64.
      sizes_E: int32, rows per group, in order; their sum is at most M.
      interpret: as `plgpu.kernel` takes it.
    """
    M, E = x_MK.shape[0], kernels.shape[0]
    x_MK = _whole(x_MK)
    O = kernels.shape[1 if out_first else 2]
    tile = Tile(rows=128 if M > 64 * E else 64, columns=128 if O % 256 == 0 else 64, steps=4)
    kernel = plgpu.kernel(
        partial(_rows_body, tile, out_first),
        out_type=jax.ShapeDtypeStruct((x_MK.shape[0], O), x_MK.dtype),
        grid=(_blocks(1, interpret),),
        grid_names=('block',),
        num_threads=3,
        thread_name='wg',
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    y_MO = kernel(*walk(sizes_E, M, tile.rows), x_MK, kernels)[:M]
    # What no block has written is not zero but whatever was there; this joins the reader's own pass over y.
    return jnp.where((jnp.arange(M) < jnp.sum(sizes_E))[:, None], y_MO, 0)


def group_product(left_MO, right_MK, sizes_E, dtype: Any, *, interpret: Any = None):
    """For every group the sum over its rows of left^T right -> [E, O, K] in `dtype`, accumulated in float32.

    A group without rows gives 0. left and right: bfloat16 or float16, both of one dtype, widths multiples of 64;
    sizes_E as in `rows_product`.
    """
    (_, O), (_, K), E = left_MO.shape, right_MK.shape, sizes_E.shape[0]
    rows, columns = (128 if width % 128 == 0 else 64 for width in (O, K))
    tile = Tile(rows, columns, steps=3)
    ends = jnp.cumsum(sizes_E, dtype=jnp.int32)
    kernel = plgpu.kernel(
        partial(_group_body, tile),
        out_type=jax.ShapeDtypeStruct((E, O, K), dtype),
        grid=(_blocks(2, interpret),),  # two share a multiprocessor: one stores while the other multiplies
        grid_names=('block',),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(ends - sizes_E, ends, _whole(left_MO), _whole(right_MK))


def _whole(x_MK):
    """x with rows of zeros up to a multiple of 8: the copy engine takes arrays as tiles of 8 rows."""
    return jnp.pad(x_MK, ((0, -x_MK.shape[0] % 8), (0, 0))) if x_MK.shape[0] % 8 else x_MK


def _blocks(per_sm: int, interpret: Any) -> int:
    """Blocks that stay for the whole product, each taking one piece of the result after the other."""
    return 2 if interpret is not None else per_sm * multiprocessors()


def _layout(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile with so many columns lies in shared memory, so that the tensor cores and the copies both read it."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(dtype).itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def _rows_body(tile: Tile, out_first: bool, total, group, run, start, size, x, kernels, y):
    """The kernel of `rows_product`: two warpgroups multiply, side by side in the columns, and a third one loads."""
    dtype, wide = x.dtype, 2 * tile.columns
    part = 32  # columns that leave at a time: what shared memory has left beside four steps

    def pipeline(step, context, index, column):
        """The loads of one tile of y, along the depth of the product."""
        x_block = plgpu.BlockSpec((tile.rows, tile.depth), lambda k: (run[index], k), transforms=_layout(64, dtype))
        if out_first:
            kernel_block = plgpu.BlockSpec((wide, tile.depth), lambda k: (column, k), transforms=_layout(64, dtype))
        else:
            kernel_block = plgpu.BlockSpec((tile.depth, wide), lambda k: (k, column), transforms=_layout(64, dtype))
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(x.shape[1] // tile.depth,),
            memory_registers=40,
            in_specs=[x_block, kernel_block],
            wg_axis='wg',
            num_compute_wgs=2,
            max_concurrent_steps=tile.steps,
            compute_context=context,
        )

    def nothing(*_, **__):
        """Stands in where only the pipeline's buffers are asked for."""

    @partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing, 0, 0).get_allocations(x, kernels.at[0]),
        whole=plgpu.SMEM((2, tile.rows, part), dtype, transforms=_layout(part, dtype)),
        ragged=plgpu.SMEM((2, tile.rows, part), dtype),
        collective_axes='wg',
    )
    def _(buffers, whole, ragged):
        side = lax.axis_index('wg')

        @plgpu.nd_loop((total[0], pl.cdiv(y.shape[1], wide)), collective_axes='block')
        def _(here):
            index, column = here.index

            def step(_, x_tile, kernel_tile, acc):
                own = pl.ds(side * tile.columns, tile.columns)
                plgpu.wgmma(acc, x_tile, kernel_tile.at[own].T if out_first else kernel_tile.at[:, own])
                plgpu.wgmma_wait(0)
                return acc

            def multiply_and_store(multiply: Callable):
                def scope(acc):
                    multiply(acc)
                    result = acc[...].astype(dtype)
                    for at in range(0, tile.columns, part):
                        columns = y.at[:, pl.ds(column * wide + side * tile.columns + at, part)]
                        rows = run[index] * tile.rows, start[index], size[index]
                        store_rows(result[:, at : at + part], whole.at[side], ragged.at[side], columns, *rows)

                pl.run_scoped(scope, plgpu.ACC((tile.rows, tile.columns)))

            pipeline(step, multiply_and_store, index, column)(x, kernels.at[group[index]], allocations=buffers)

        plgpu.wait_smem_to_gmem(0)


def store_rows(result, whole, ragged, target, top, first, count):
    """Copies rows first ... first + count of the result to rows top + first ... of the target.

    The size of a copy is fixed when the kernel is compiled: a full run goes in one, others in powers of two, which may
    begin at any row and so cannot be swizzled.
    """
    rows = whole.shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(count == rows)
    def _():
        whole[...] = result
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole, target.at[pl.ds(top, rows)])

    @pl.when(count < rows)
    def _():
        ragged[...] = result
        plgpu.commit_smem()
        done = first
        for bit in reversed(range(min(target.shape[0], rows - 1).bit_length())):
            power = 1 << bit

            @pl.when(count & power != 0)
            def _(done=done, power=power):
                plgpu.copy_smem_to_gmem(ragged.at[pl.ds(done, power)], target.at[pl.ds(top + done, power)])

            done = done + (count & power)


def _group_body(tile: Tile, starts, ends, left, right, out):
    """The kernel of `group_product`: the one warpgroup of a block walks over the rows of a group."""
    part = LINE // jnp.dtype(out.dtype).itemsize  # columns that leave at a time

    @plgpu.nd_loop((out.shape[0], out.shape[1] // tile.rows, out.shape[2] // tile.columns), collective_axes='block')
    def _(here):
        group, row, column = here.index
        start, end = starts[group], ends[group]
        first = lax.div(start, tile.depth)
        steps = lax.div(end + tile.depth - 1, tile.depth) - first

        def block(width, at):
            return plgpu.BlockSpec(
                (tile.depth, width), lambda k: (first + k, at), delay_release=1, transforms=_layout(64, left.dtype)
            )

        def scope(acc):
            """The product over the rows of the group; what a block holds of other groups is made 0 first."""

            def step(at, left_tile, right_tile):
                top = (first + at[0]) * tile.depth

                @pl.when((top < start) | (top + tile.depth > end))
                def _():
                    _only_own(left_tile, top, start, end)
                    _only_own(right_tile, top, start, end)
                    plgpu.commit_smem()

                plgpu.wgmma(acc, left_tile.T, right_tile)

            @pl.when(end > start)
            def _():
                in_specs = [block(tile.rows, row), block(tile.columns, column)]
                plgpu.emit_pipeline(step, grid=(steps,), in_specs=in_specs, max_concurrent_steps=tile.steps)(
                    left, right
                )

            return acc[...].astype(out.dtype)

        total = pl.run_scoped(scope, plgpu.ACC((tile.rows, tile.columns)))

        @partial(pl.run_scoped, buffer=plgpu.SMEM((tile.rows, part), out.dtype, transforms=_layout(part, out.dtype)))
        def _(buffer):
            target = out.at[group, pl.ds(row * tile.rows, tile.rows)]
            for at in range(0, tile.columns, part):
                buffer[...] = total[:, at : at + part]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, target.at[:, pl.ds(column * tile.columns + at, part)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _only_own(tile, top, start, end):
    """Zeros in the rows of a tile, which begins at row `top`, that are not start ... end - 1."""
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, tile.shape, 0), plgpu.Layout.WGMMA) + top
    tile[...] = jnp.where((row >= start) & (row < end), tile[...], jnp.zeros((), tile.dtype))
