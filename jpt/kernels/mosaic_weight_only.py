"""A few bfloat16 rows times an E4M3 weight with block scales on Hopper; weight_only_matmul.py says what is computed.

The weight is the left operand of the tensor cores, 64 of its rows at a time, and goes to them from registers, where
its codes become bfloat16; the rows of x are the right operand, 8 of them or more. So the product is y transposed. Where
the weight has too few rows to give every multiprocessor some, K is divided as well: XLA adds the parts up as it
transposes them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.hopper import multiprocessors, swizzled
from jpt.kernels.low_precision import E4M3
from jpt.kernels.mosaic_block_matmul import HEIGHT, WARPGROUPS

ROWS = WARPGROUPS * HEIGHT  # of the weight that a block multiplies: those that share a scale
RING = 96 * 1024  # bytes of shared memory for the steps in flight: two blocks share a multiprocessor
STEPS = 6


def choose_parts(N: int, K: int, M: int, blocks: int) -> int:
    """Parts that K is divided in, so that `blocks` have work.

    No more than one for every four steps; and the parts, which are written and read in float32, are to be an eighth of
    the weight at most.
    """
    most = min(pl.cdiv(K, BLOCK) // 4, K // (64 * M))
    return max(1, min(blocks // pl.cdiv(N, ROWS), most))


def product(x_MK, codes_NK, scale, dtype: Any, *, parts: int | None = None, interpret: Any = None):
    """As `weight_only_matmul.weight_only_matmul`, K in this many parts; interpret: as `plgpu.kernel` takes it."""
    (M, K), N = x_MK.shape, codes_NK.shape[0]
    x_MK = jnp.pad(x_MK, ((0, -M % 8), (0, 0)))
    width, total = x_MK.shape[0], pl.cdiv(K, BLOCK)
    each = pl.cdiv(total, parts or choose_parts(N, K, width, 2 * multiprocessors(interpret)))
    parts = pl.cdiv(total, each)
    steps = min(STEPS, RING // (BLOCK * (ROWS + 2 * width)))
    # The interpreter knows no operand in registers: there the weight goes through shared memory.
    layout = swizzled(BLOCK, x_MK.dtype)
    stage = [plgpu.SMEM((WARPGROUPS, HEIGHT, BLOCK), x_MK.dtype, transforms=layout)] if interpret else []
    kernel = plgpu.kernel(
        partial(_body, steps, each),
        out_type=jax.ShapeDtypeStruct((parts, N, width), jnp.float32),
        grid=(pl.cdiv(N, ROWS), parts),
        grid_names=('row', 'part'),
        num_threads=WARPGROUPS + 1,
        thread_name='wg',
        scratch_types=[
            plgpu.SMEM((steps, ROWS, BLOCK), E4M3, transforms=swizzled(K, E4M3)),
            plgpu.SMEM((steps, width, BLOCK), x_MK.dtype, transforms=swizzled(K, x_MK.dtype)),
            plgpu.SMEM((WARPGROUPS, HEIGHT, width), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=steps),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=steps),
            *stage,
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    y_PNM = kernel(codes_NK, x_MK, scale)
    return jnp.sum(y_PNM, axis=0)[:, :M].T.astype(dtype)


def to_bfloat16(codes):
    """E4M3 codes as bfloat16, all of them exact.

    Hopper converts two of them to float16 at once, and float32 to bfloat16 likewise; five instructions for two numbers.
    By their bits (shifted to where bfloat16 has them, times 2^120) it takes the compiler more than twice as many.
    """
    return codes.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)


def _body(steps: int, each: int, codes, x, scale, y, code_tiles, x_tiles, out, loaded, used, *stage):
    """The kernel: one run of 128 rows of the weight, times one part of K."""
    side, row, part = (lax.axis_index(name) for name in ('wg', 'row', 'part'))
    begin = part * each
    count = jnp.minimum(pl.cdiv(x.shape[1], BLOCK) - begin, each)

    def load():
        """Fetches codes and inputs, some steps ahead of the products."""

        def one_step(step, nothing):
            """Waits for a free slot and fills it."""
            slot, depth = lax.rem(step, steps), pl.ds((begin + step) * BLOCK, BLOCK)

            @pl.when(step >= steps)
            def _():
                plgpu.barrier_wait(used.at[slot])

            plgpu.copy_gmem_to_smem(codes.at[pl.ds(row * ROWS, ROWS), depth], code_tiles.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(x.at[:, depth], x_tiles.at[slot], loaded.at[slot])
            return nothing

        lax.fori_loop(0, count, one_step, None)

    def multiply():
        """Adds up the products of a warpgroup's rows, and stores them."""

        def one_step(step, total):
            """The sum with the product of one block of K, scaled in float32."""
            slot, factor = lax.rem(step, steps), scale[row, begin + step]
            plgpu.barrier_wait(loaded.at[slot])

            def scope(acc):
                own = code_tiles[slot, pl.ds(side * HEIGHT, HEIGHT)]
                weight = to_bfloat16(plgpu.layout_cast(own, plgpu.Layout.WGMMA))
                for ref in stage:
                    ref[side] = weight
                    plgpu.commit_smem()
                    weight = ref.at[side]
                plgpu.wgmma(acc, weight, x_tiles.at[slot].T)
                plgpu.commit_smem()  # codes are read before the copy engine writes anew
                return plgpu.wgmma_accumulator_load(acc, wait_n=0)

            found = pl.run_scoped(scope, plgpu.ACC((HEIGHT, x.shape[0])))
            plgpu.barrier_arrive(used.at[slot])
            return total + found * factor

        nothing = plgpu.layout_cast(jnp.zeros((HEIGHT, x.shape[0]), jnp.float32), plgpu.Layout.WGMMA)
        out[side] = lax.fori_loop(0, count, one_step, nothing)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[side], y.at[part, pl.ds(row * ROWS + side * HEIGHT, HEIGHT)])
        plgpu.wait_smem_to_gmem(0)

    lax.cond(side == WARPGROUPS, load, multiply)
