"""Products of E4M3 codes whose scales belong to 128 columns of K: inputs 1 x 128, weights 128 x 128 (DeepSeek-V3's).

    y[m, n] = sum over blocks k of a_scale[m, k] * b_scale[n // 128, k] * (a[m, k's 128] . b[n, k's 128])

or with a scale for each row of b too, b_scale[n, k], which is how gradients of weights are multiplied (DeepSeek-V3
technical report, 2024, arXiv:2412.19437, sections 3.3.2 and 3.3.3). The sum over blocks is in float32: Hopper's tensor
cores add up products of 8 bits with about 14 bits, so nothing stays there for longer than 128 of them. Nothing here is
differentiated, and nothing knows a mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.hopper import reason_not_hopper, swizzle_of
from jpt.kernels.local import platform
from jpt.kernels.low_precision import E4M3

IMPLEMENTATIONS = ('auto', 'reference', 'mosaic')
OUTPUTS = ('bfloat16', 'float16', 'float32')


def block_matmul(a_MK, a_scale, b_NK, b_scale, dtype: Any = jnp.bfloat16, *, implementation: str = 'auto'):
    """a [M, K] times b [N, K] transposed, both e4m3 codes with scales -> [M, N] in `dtype`.

    Args:
      a_scale: float32 [M, ceil(K / 128)], as `quantize_rows` gives it.
      b_scale: float32 [ceil(N / 128), ceil(K / 128)], of blocks of 128 x 128 that may be smaller at the edges; or
        [N, ceil(K / 128)], of rows like those of a.
      dtype: bfloat16, float16 or float32; the float32 sum is rounded to it once.
      implementation: 'reference', 'mosaic' (Hopper's tensor cores) or 'auto', which is 'mosaic' where `refusal` knows
        no reason against it.

    Raises:
      ValueError: an unknown name, shapes or dtypes that do not belong together, an implementation that cannot be used.
    """
    (M, K), N = check_codes('block_matmul', a_MK, a_scale, b_NK, 2), b_NK.shape[0]
    blocks = -(-K // BLOCK)
    rows = N if by_rows(b_NK, b_scale) else -(-N // BLOCK)
    check_scales('block_matmul', {'a_scale': (a_scale, (M, blocks)), 'b_scale': (b_scale, (rows, blocks))})
    if chosen('block_matmul', implementation, dtype, refusal(a_MK, b_NK, dtype)) == 'mosaic':
        from jpt.kernels.mosaic_block_matmul import product  # Pallas: not loaded where it is not used

        return product(a_MK, a_scale, b_NK, b_scale, dtype)
    return reference(a_MK, a_scale, b_NK, b_scale).astype(dtype)


def by_rows(b_NK, b_scale) -> bool:
    """Whether b [N, K] has a scale for each of its rows and not for 128 together."""
    return b_scale.ndim == 2 and b_NK.shape[0] > 1 and b_scale.shape[0] == b_NK.shape[0]


def refusal(a_MK, b_NK, dtype: Any) -> str | None:
    """Why 'mosaic' cannot multiply these here, or None where it can: the one place that says when."""
    N, K = b_NK.shape[-2:]
    reasons = {
        f'the depth {K} is not a multiple of 32': not swizzle_of(K, E4M3),
        f'rows of {N} {jnp.dtype(dtype).name} are not whole lines of 32 bytes': not swizzle_of(N, dtype),
        'there are no rows': not a_MK.shape[0],
    }
    return reason_not_hopper() or next((reason for reason, holds in reasons.items() if holds), None)


def check_codes(place: str, a_MK, a_scale, b, ndim: int) -> tuple[int, int]:
    """M and K of codes a [M, K] and b [..., N, K] of `ndim` axes.

    Raises:
      ValueError: other codes than e4m3, other shapes, nothing to add up.
    """
    if a_MK.ndim != 2 or b.ndim != ndim or a_MK.shape[1] != b.shape[-1] or not a_MK.shape[1]:
        expected = '[M, K] and [N, K]' if ndim == 2 else '[M, K] and [E, N, K]'
        raise ValueError(f'{place}: shapes {a_MK.shape} and {b.shape}: expected {expected}, K at least 1')
    if a_MK.dtype != E4M3 or b.dtype != E4M3:
        raise ValueError(f'{place}: codes of {a_MK.dtype} and {b.dtype}: expected {jnp.dtype(E4M3).name}')
    return a_MK.shape


def check_scales(place: str, scales: dict[str, tuple[Any, tuple[int, ...]]]) -> None:
    """Whether scales, by name, are float32 and have the shape beside them.

    Raises:
      ValueError: they are not.
    """
    for name, (scale, shape) in scales.items():
        if scale.shape != shape or scale.dtype != jnp.float32:
            raise ValueError(f'{place}: {name} {scale.dtype}{scale.shape}: expected float32{shape}')


def chosen(place: str, implementation: str, dtype: Any, refused: str | None) -> str:
    """'reference' or 'mosaic'.

    Raises:
      ValueError: an unknown implementation or dtype of the result, or 'mosaic' where it is refused.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ', '.join(IMPLEMENTATIONS)
        raise ValueError(f'{place}: implementation={implementation!r}: expected one of {known}')
    if jnp.dtype(dtype).name not in OUTPUTS:
        raise ValueError(f'{place}: dtype={jnp.dtype(dtype).name}: expected one of {", ".join(OUTPUTS)}')
    if implementation == 'mosaic' and refused:
        raise ValueError(f"{place}: implementation='mosaic' cannot be used: {refused}")
    return 'reference' if implementation == 'reference' or refused else 'mosaic'


def reference(a_MK, a_scale, b_NK, b_scale):
    """The formula above, block after block of K, in float32."""
    N = b_NK.shape[0]
    # Both hold every code; products of two are exact in float32, which bfloat16 operands add up in on GPUs.
    operand = jnp.bfloat16 if platform() == 'gpu' else jnp.float32
    scale_KN = b_scale.T if by_rows(b_NK, b_scale) else jnp.repeat(b_scale.T, BLOCK, axis=1)[:, :N]

    def add_block(total_MN, block):
        a_MC, a_scale_M, b_NC, scale_N = block
        product_MN = lax.dot_general(
            a_MC.astype(operand), b_NC.astype(operand), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total_MN + product_MN * (a_scale_M[:, None] * scale_N[None]), None

    blocks = in_blocks(a_MK), a_scale.T, in_blocks(b_NK), scale_KN
    return lax.scan(add_block, jnp.zeros((a_MK.shape[0], N), jnp.float32), blocks)[0]


def in_blocks(codes):
    """[N, K] -> [ceil(K / 128), N, 128], with zeros behind the last column."""
    N, K = codes.shape
    codes = jax.lax.pad(codes, jnp.zeros((), codes.dtype), ((0, 0, 0), (0, -K % BLOCK, 0)))
    return codes.reshape(N, codes.shape[1] // BLOCK, BLOCK).swapaxes(0, 1)
