"""Blockwise FP8 products of rows that are sorted by group, each group with a kernel of its own: quantized experts.

    y[m, n] = sum over blocks k of a_scale[m, k] * b_scale[g, n // 128, k] * (a[m, k's 128] . b[g, n, k's 128])

with g the group of row m: block_matmul.py's formula on grouped_matmul.py's rows. Only the kernels of groups that have
rows are read. Nothing here is differentiated, and nothing knows a mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jpt.kernels.block_matmul import check_codes, check_scales, chosen, in_blocks
from jpt.kernels.block_matmul import refusal as refusal_of_one
from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.grouped_matmul import grouped_matmul


def grouped_block_matmul(
    a_MK, a_scale, b_ENK, b_scale, sizes_E, dtype: Any = jnp.bfloat16, *, implementation: str = 'auto'
):
    """Codes a [M, K] times the kernel of each row's group, codes b [E, N, K] -> [M, N] in `dtype`.

    Group e owns the `sizes_E[e]` (int32) rows that follow those of group e - 1; any group may be empty, and the sum is
    at most M. Rows beyond the sum give 0, whatever a and its scales hold there.

    Args:
      a_scale: float32 [M, ceil(K / 128)], as `quantize_rows` gives it.
      b_scale: float32 [E, ceil(N / 128), ceil(K / 128)].
      dtype, implementation: as in `block_matmul`; the reference multiplies block after block by `grouped_matmul`.

    Raises:
      ValueError: an unknown name, shapes or dtypes that do not belong together, an implementation that cannot be used.
    """
    (M, K), (E, N) = check_codes('grouped_block_matmul', a_MK, a_scale, b_ENK, 3), b_ENK.shape[:2]
    blocks = -(-K // BLOCK)
    wanted = {'a_scale': (a_scale, (M, blocks)), 'b_scale': (b_scale, (E, -(-N // BLOCK), blocks))}
    check_scales('grouped_block_matmul', wanted)
    if sizes_E.shape != (E,) or sizes_E.dtype != jnp.int32:
        raise ValueError(f'grouped_block_matmul: sizes_E {sizes_E.dtype}{sizes_E.shape}: expected int32({E},)')
    if chosen('grouped_block_matmul', implementation, dtype, refusal(a_MK, b_ENK, dtype)) == 'mosaic':
        from jpt.kernels.mosaic_grouped_block import product  # Pallas: not loaded where it is not used

        return product(a_MK, a_scale, b_ENK, b_scale, sizes_E, dtype)
    return reference(a_MK, a_scale, b_ENK, b_scale, sizes_E).astype(dtype)


def refusal(a_MK, b_ENK, dtype: Any) -> str | None:
    """Why 'mosaic' cannot multiply these here, or None where it can: the reasons of `block_matmul`."""
    return refusal_of_one(a_MK, b_ENK, dtype)


def reference(a_MK, a_scale, b_ENK, b_scale, sizes_E):
    """The formula above, block after block of K, in float32."""
    (M, _), (E, N, K) = a_MK.shape, b_ENK.shape
    row_M = jnp.arange(M)
    group_M = jnp.minimum(jnp.searchsorted(jnp.cumsum(sizes_E), row_M, side='right'), E - 1)
    own = (row_M < jnp.sum(sizes_E))[:, None]

    def add_block(total_MN, block):
        a_MC, a_scale_M, b_EN_C, b_scale_EB = block
        b_ENC = b_EN_C.reshape(E, N, BLOCK).astype(jnp.float32)
        product_MN = grouped_matmul(a_MC.astype(jnp.float32), b_ENC, sizes_E)
        scale_MN = jnp.repeat(b_scale_EB[group_M], BLOCK, axis=1)[:, :N] * a_scale_M[:, None]
        return total_MN + jnp.where(own, product_MN * scale_MN, 0), None

    blocks = in_blocks(a_MK), a_scale.T, in_blocks(b_ENK.reshape(E * N, K)), jnp.moveaxis(b_scale, -1, 0)
    return jax.lax.scan(add_block, jnp.zeros((M, N), jnp.float32), blocks)[0]
