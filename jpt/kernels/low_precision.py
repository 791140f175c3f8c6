"""Rounding to eight and four bits exactly as the formulas say, on every backend, and packing four bits into bytes.

Formats: E4M3, E5M2 and E8M0 as in the OCP 8-bit Floating Point Specification (OFP8) v1.0 and Microscaling Formats (MX)
v1.0, E2M1 as in the latter. A scale is a multiplier throughout: number = code * scale.
"""

import jax
import jax.numpy as jnp

from jpt.kernels.local import platform

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2
E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
INT4_MAX = 7.0
LEAST = 2.0**-126  # the least normal number of float32 and bfloat16
# The positive numbers of E2M1 in the order of their codes.
E2M1_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between code i and i + 1 lies the i-th of these; one that is met goes to the even code.
_E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def exact_divide(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """x / divisor as IEEE 754 rounds it to x's dtype, float32 or narrower; the divisor is positive and broadcasts to x.

    XLA turns a division by a constant or by a broadcast operand into a product with its reciprocal, and on GPUs XLA and
    Mosaic divide float32 approximately (`div.full.f32`): other numbers for up to a third of all quotients. In float64
    even the product with the reciprocal, at most 2^-52 off, rounds to the right float32: a quotient of two numbers of
    24 bits is no nearer than 2^-49 to the middle between two others. Numbers below 2^-126 count as zero, as they do in
    XLA on CPU, on every backend.
    """
    with jax.enable_x64(True):
        reciprocal = 1 / jnp.asarray(divisor, x.dtype).astype(jnp.float64)
        quotient = (x.astype(jnp.float64) * reciprocal).astype(x.dtype)
    return jnp.where(jnp.abs(quotient) < LEAST, quotient * 0, quotient)  # the sign stays


def to_e4m3(x: jax.Array) -> jax.Array:
    """The nearest E4M3 number, ties to even, saturating at 448; NaN stays NaN.

    Backends differ beyond 464 (NaN on CPU, 448 on GPU), so nothing gets there. On CPU float32 is rounded by its bits,
    which takes a third of the time of XLA's own conversion there; GPUs have an instruction for it.
    """
    x = jnp.clip(x, -E4M3_MAX, E4M3_MAX)
    if x.dtype != jnp.float32 or platform() != 'cpu':
        return x.astype(E4M3)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    size = bits & 0x7FFFFFFF
    # From 2^-6 on: half of the 20 bits that go, and the last that stays, carry into it; then another exponent's bias.
    normal = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3)
    # Below, numbers are multiples of 2^-9: so are those of float32 from 2^14 to 2^15.
    small = jax.lax.bitcast_convert_type(jnp.abs(x) + 2.0**14, jnp.uint32) - (141 << 23)
    code = jnp.where(size < 121 << 23, small, normal)
    code = jnp.where(size > 0x7F800000, 0x7F, code) | (bits >> 24 & 0x80)
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), E4M3)


def to_e5m2(x: jax.Array) -> jax.Array:
    """The nearest E5M2 number, ties to even, saturating at 57344; NaN stays NaN."""
    return jnp.clip(x, -E5M2_MAX, E5M2_MAX).astype(E5M2)


def to_e2m1(x: jax.Array) -> jax.Array:
    """The codes (uint8, 0..15; the fourth bit is the sign) of the nearest E2M1 numbers, ties to even, up to 6."""
    size = jnp.abs(x)
    code = jnp.zeros(x.shape, jnp.uint8)
    for lower, middle in enumerate(_E2M1_MIDDLES):
        # The even code of the two has the tie: the lower one where `lower` is even.
        code += (size > middle if lower % 2 == 0 else size >= middle).astype(jnp.uint8)
    # What is below zero and rounds to it keeps its sign; a negative zero, as in ModelOpt, does not.
    return code | ((x < 0).astype(jnp.uint8) << 3)


def from_e2m1(codes: jax.Array) -> jax.Array:
    """The numbers (float32) of codes 0..15."""
    magnitude = jnp.take(jnp.asarray(E2M1_NUMBERS, jnp.float32), codes & 7, mode='clip')
    return jnp.where(codes >= 8, -magnitude, magnitude)


def to_integer(x: jax.Array, largest: float) -> jax.Array:
    """The nearest integers (int8) within +-largest, ties to even."""
    return jnp.clip(jnp.round(x), -largest, largest).astype(jnp.int8)


def to_e8m0(scale: jax.Array) -> jax.Array:
    """The codes (uint8) of 2^ceil(log2 scale), within 2^-127 and 2^127, of float32 numbers >= 0; by their bits."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    # Below 2^-126 the fraction alone is the number: 2^-127 is its highest bit.
    above = jnp.where(exponent > 0, fraction > 0, fraction > 1 << 22)
    return jnp.minimum(exponent + above.astype(jnp.uint32), 254).astype(jnp.uint8)


def to_power_of_two(amax: jax.Array, largest: float) -> jax.Array:
    """The codes (uint8) of 2^ceil(log2(amax / largest)), of float32 numbers that are 0 or at least 2^-126.

    What the division gives below 2^-126 would count as zero: small numbers are divided 2^64 times as large.
    """
    small = amax < 2.0**-60
    code = to_e8m0(exact_divide(jnp.where(small, amax * 2.0**64, amax), largest)).astype(jnp.int32)
    return jnp.where(small, jnp.maximum(code - 64, 0), code).astype(jnp.uint8)


def from_e8m0(codes: jax.Array) -> jax.Array:
    """The numbers (float32) 2^(code - 127) of codes 0..254; backends without subnormal numbers give 0 for code 0."""
    bits = jnp.where(codes > 0, codes.astype(jnp.uint32) << 23, 1 << 22)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def pack(codes: jax.Array) -> jax.Array:
    """Two 4-bit codes to a byte, along the last axis, the first in the low half: [..., 2 n] -> [..., n] uint8."""
    pairs = (codes.astype(jnp.uint8) & 15).reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """The codes (uint8, 0..15) of packed bytes: [..., n] -> [..., 2 n]."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def signed(codes: jax.Array) -> jax.Array:
    """Codes 0..15 of two's complement as int8 numbers -8..7."""
    return ((codes ^ 8).astype(jnp.int8)) - 8
