"""Products of a few rows with a weight in E4M3 whose blocks of 128 x 128 have a scale: decoding.

    y[m, n] = sum over blocks k of scale[n // 128, k] * (x[m, k's 128] . codes[n, k's 128])

Rows stay as they are; only the weight is in 8 bits, and reading it is what takes the time. XLA writes the whole weight
in 16 bits before it multiplies, 5 bytes of traffic per weight; the Mosaic kernel reads one. The sum over blocks is in
float32. Nothing here is differentiated, and nothing knows a mesh.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jpt.kernels.block_matmul import check_scales, chosen, in_blocks
from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.hopper import reason_not_hopper, swizzle_of
from jpt.kernels.low_precision import E4M3

MOST_ROWS = 64  # more of them are worth a product of 8 bits, or a weight in 16
INPUTS = ('bfloat16', 'float16', 'float32')


def weight_only_matmul(x_MK, codes_NK, scale, dtype: Any = None, *, implementation: str = 'auto'):
    """x [M, K] times the weight codes * scale [N, K] transposed -> [M, N] in `dtype`, which defaults to x's.

    Args:
      x_MK: bfloat16, float16 or float32.
      codes_NK: e4m3.
      scale: float32 [ceil(N / 128), ceil(K / 128)].
      implementation: 'reference', 'mosaic' (at most 64 rows of bfloat16 on Hopper) or 'auto', which is 'mosaic' where
        `refusal` knows no reason against it.

    Raises:
      ValueError: an unknown name, shapes or dtypes that do not belong together, an implementation that cannot be used.
    """
    dtype = x_MK.dtype if dtype is None else dtype
    if x_MK.ndim != 2 or codes_NK.ndim != 2 or x_MK.shape[1] != codes_NK.shape[1] or not x_MK.shape[1]:
        shapes = f'{x_MK.shape} and {codes_NK.shape}'
        raise ValueError(f'weight_only_matmul: shapes {shapes}: expected [M, K] and [N, K], K at least 1')
    if x_MK.dtype.name not in INPUTS or codes_NK.dtype != E4M3:
        found = f'x of {x_MK.dtype} and codes of {codes_NK.dtype}'
        raise ValueError(
            f'weight_only_matmul: {found}: expected one of {", ".join(INPUTS)}, and {jnp.dtype(E4M3).name}'
        )
    N, K = codes_NK.shape
    check_scales('weight_only_matmul', {'scale': (scale, (-(-N // BLOCK), -(-K // BLOCK)))})
    if chosen('weight_only_matmul', implementation, dtype, refusal(x_MK, codes_NK)) == 'mosaic':
        from jpt.kernels.mosaic_weight_only import product  # Pallas: not loaded where it is not used

        return product(x_MK, codes_NK, scale, dtype)
    return reference(x_MK, codes_NK, scale).astype(dtype)


def refusal(x_MK, codes_NK) -> str | None:
    """Why 'mosaic' cannot multiply these here, or None where it can: the one place that says when."""
    (M, K), N = x_MK.shape, codes_NK.shape[0]
    reasons = {
        f'the rows are of {x_MK.dtype}, not bfloat16': x_MK.dtype != jnp.bfloat16,
        f'there are {M} rows, not 1 to {MOST_ROWS}': not 1 <= M <= MOST_ROWS,
        f'the depth {K} is not a multiple of 32': not swizzle_of(K, E4M3),
        f'the weight has {N} rows, not a multiple of 8': bool(N % 8 or not N),
    }
    return reason_not_hopper() or next((reason for reason, holds in reasons.items() if holds), None)


def reference(x_MK, codes_NK, scale):
    """The formula above, block after block of K; every block's product and the sum in float32."""
    N = codes_NK.shape[0]
    scale_KN = jnp.repeat(scale.T, BLOCK, axis=1)[:, :N]

    def add_block(total_MN, block):
        x_MC, codes_NC, scale_N = block
        codes_NC = codes_NC.astype(x_MC.dtype)  # each of them can hold every code
        sides = ((1,), (1,)), ((), ())
        product_MN = lax.dot_general(x_MC, codes_NC, sides, preferred_element_type=jnp.float32)
        return total_MN + product_MN * scale_N[None], None

    blocks = in_blocks(x_MK), in_blocks(codes_NK), scale_KN
    return lax.scan(add_block, jnp.zeros((x_MK.shape[0], N), jnp.float32), blocks)[0]
