"""Rounding rows to E4M3 with a scale per run of columns: what an input of a blockwise FP8 product becomes.

    scale = f32(amax) / 448, or the power of two at or above it;  code = E4M3(f32(x) / scale)

one IEEE division each, and number = code * scale: the same bits on every backend. On Hopper a Mosaic kernel
(mosaic_quantize.py) does it in one pass over x; XLA makes three kernels and reads x twice. The fused forms quantize
what is made of x on the way: in float32, rounded to x's dtype, as the array would be that they save to write. So their
codes are those of that array. Exponentials and sums of squares may differ in their last bits from one backend to
another, and codes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jpt.kernels.hopper import reason_not_hopper, swizzle_of
from jpt.kernels.low_precision import E4M3, E4M3_MAX, LEAST, exact_divide, to_e4m3

IMPLEMENTATIONS = ('auto', 'reference', 'mosaic')
SCALES = ('float32', 'power_of_two')
COLUMNS = 128
DTYPES = ('bfloat16', 'float16', 'float32')


def quantize_rows(x, columns: int = COLUMNS, scale: str = 'float32', *, implementation: str = 'auto'):
    """x [..., K] -> codes (e4m3 [..., K]) and scales (float32 [..., ceil(K / columns)]); the last run may be shorter.

    A run that is all zero, or whose scale would be below 2^-126, has scale 1. One NaN or infinity makes every
    code * scale of its run NaN.

    Args:
      columns: how many neighbours along the last axis share a scale.
      scale: 'float32' (amax / 448 rounded once) or 'power_of_two'.
      implementation: 'reference', 'mosaic' or 'auto', which is 'mosaic' where `refusal` knows no reason against it.

    Raises:
      ValueError: an unknown name, an empty last axis, or an implementation that cannot be used here.
    """
    rows = _flat(x)
    if _chosen('quantize_rows', implementation, (rows,), columns, scale) == 'mosaic':
        from jpt.kernels.mosaic_quantize import quantize  # Pallas: not loaded where it is not used

        return _shaped(x.shape, *quantize(rows, scale=scale))
    return _reference(rounded_to(x.dtype, x.astype(jnp.float32)), columns, scale)


def quantize_gated(gate, up, columns: int = COLUMNS, scale: str = 'float32', *, implementation: str = 'auto'):
    """Quantizes `silu_gated(gate, up)`, both [..., K] and of one dtype; else as `quantize_rows`."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f'quantize_gated: gate {gate.dtype}{gate.shape}, up {up.dtype}{up.shape}: expected the same')
    rows = _flat(gate), _flat(up)
    if _chosen('quantize_gated', implementation, rows, columns, scale) == 'mosaic':
        from jpt.kernels.mosaic_quantize import quantize

        return _shaped(gate.shape, *quantize(*rows, produce=silu_times, scale=scale))
    return _reference(rounded_to(gate.dtype, silu_times(gate, up)), columns, scale)


def quantize_normed(
    x, weight_K, eps: float, columns: int = COLUMNS, scale: str = 'float32', *, implementation: str = 'auto'
):
    """Quantizes RMSNorm(x) * weight, x [..., K] and weight [K], in float32 and x's dtype; else as `quantize_rows`.

    The mean of squares of every row is a pass of its own over x, by XLA.
    """
    if weight_K.shape != x.shape[-1:]:
        raise ValueError(f'quantize_normed: weight_K {weight_K.shape} for x {x.shape}: expected {x.shape[-1:]}')
    rows, weight_K = _flat(x), weight_K.astype(jnp.float32)
    squares = jnp.mean(jnp.square(rows.astype(jnp.float32)), axis=-1)
    inverse_M = jax.lax.rsqrt(squares + eps)
    if _chosen('quantize_normed', implementation, (rows,), columns, scale) == 'mosaic':
        from jpt.kernels.mosaic_quantize import quantize

        options = {'row_factor': inverse_M, 'column_factor': weight_K, 'scale': scale}
        return _shaped(x.shape, *quantize(rows, **options))
    normed = rows.astype(jnp.float32) * inverse_M[:, None] * weight_K[None]
    return _shaped(x.shape, *_reference(rounded_to(x.dtype, normed), columns, scale))


def silu_gated(gate, up):
    """silu(gate) * up, computed in at least float32 and rounded once, to the dtype of both."""
    return silu_times(gate, up).astype(gate.dtype)


def silu_times(gate, up):
    """silu(gate) * up in at least float32."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return jax.nn.silu(gate.astype(wide)) * up.astype(wide)


def rounded_to(dtype: Any, wide):
    """Float32 numbers rounded to those of a narrower dtype.

    Not by a cast there and back, which XLA may leave out: whether codes are those of an array would depend on what
    made the array, and where.
    """
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(wide, 8, 7)
    if dtype == jnp.float16:  # of which reduce_precision has no subnormal numbers
        return jax.lax.optimization_barrier(wide.astype(dtype)).astype(jnp.float32)
    return wide


def refusal(rows: Sequence[Any], columns: int = COLUMNS) -> str | None:
    """Why 'mosaic' cannot quantize these arrays [M, K], or None where it can: the one place that says when."""
    (M, K), dtype = rows[0].shape, rows[0].dtype
    reasons = {
        f'the dtype is {dtype}, not one of {", ".join(DTYPES)}': dtype.name not in DTYPES,
        f'{columns} columns share a scale, not {COLUMNS}': columns != COLUMNS,
        f'the width {K} is not a multiple of 32': not swizzle_of(K, E4M3),
        'there are no rows': not M,
    }
    return reason_not_hopper() or next((reason for reason, holds in reasons.items() if holds), None)


def _chosen(place: str, implementation: str, rows: Sequence[Any], columns: int, scale: str) -> str:
    """'reference' or 'mosaic', after everything that may be wrong has been named."""
    for name, value, known in (('implementation', implementation, IMPLEMENTATIONS), ('scale', scale, SCALES)):
        if value not in known:
            raise ValueError(f'{place}: {name}={value!r}: expected one of {", ".join(known)}')
    if not isinstance(columns, int) or columns < 1:
        raise ValueError(f'{place}: columns={columns!r}: expected a number of at least 1')
    if not rows[0].shape[-1]:
        raise ValueError(f'{place}: shape {rows[0].shape}: expected at least one column')
    if implementation == 'reference':
        return implementation
    refused = refusal(rows, columns)
    if implementation == 'mosaic' and refused:
        raise ValueError(f"{place}: implementation='mosaic' cannot be used: {refused}")
    return 'reference' if refused else 'mosaic'


def _flat(x):
    """[..., K] -> [M, K]."""
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f'quantize: {x.dtype}{x.shape}: expected floating-point numbers [..., K]')
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)


def _shaped(shape: tuple[int, ...], codes, scales):
    """Codes and scales [M, ...] with the leading axes of `shape`."""
    return codes.reshape(shape), scales.reshape(*shape[:-1], -1)


def _reference(wide, columns: int, scale: str):
    """Codes and scales of float32 numbers [..., K]."""
    *lead, K = wide.shape
    blocks = -(-K // columns)
    wide = jnp.pad(wide, [(0, 0)] * len(lead) + [(0, blocks * columns - K)]).reshape(*lead, blocks, columns)
    scales = scale_of(jnp.max(jnp.abs(wide), axis=-1), scale)
    codes = to_e4m3(exact_divide(wide, scales[..., None]))
    return codes.reshape(*lead, blocks * columns)[..., :K], scales


def scale_of(amax, scale: str = 'float32'):
    """The scale (float32) of numbers whose largest magnitude is `amax` (float32), as in `quantize_rows`."""
    scales = exact_divide(amax, E4M3_MAX)
    if scale == 'power_of_two':
        bits = jax.lax.bitcast_convert_type(scales, jnp.int32)
        above = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)  # a fraction carries over
        scales = jnp.where(scales == scales, above, scales)
    return jnp.where(scales < LEAST, jnp.ones((), jnp.float32), scales)
