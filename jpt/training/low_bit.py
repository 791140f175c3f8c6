"""Optimizer moments in fewer bits: bfloat16, or 8 bits with one scale per block, both rounded stochastically.

A moving average moves by a small fraction of itself in a step (0.1 % of the second moment at b2=0.999), which rounding
to nearest would drop every time; stochastic rounding keeps the average right. The 8-bit code is logarithmic, eight
levels to the octave: the blockwise dynamic idea (Dettmers et al. 2022, arXiv:2110.02861) with an even relative
precision (9 %) and no table to search. Signed values keep 15.9 octaves below the largest of their block, and zero;
unsigned ones 31.9 octaves and no zero, since a second moment rounded to zero would blow its update up.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

BLOCK = 256
SMALLEST_BLOCK = 32
SMALL_LEAF = 4096  # elements; smaller leaves stay exact
_PER_OCTAVE = 8

Precision = Literal['float32', 'bfloat16', 'int8']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks8:
    """A tensor in 8 bits: `codes` uint8 in its shape, `scale` float32 [..., last / block], the blocks' largest size."""

    codes: jax.Array
    scale: jax.Array
    signed: bool = dataclasses.field(metadata={'static': True})


Moment = jax.Array | Blocks8


def block_size(shape: tuple[int, ...]) -> int | None:
    """Elements per scale along the last axis: its largest divisor up to 256, None where that is below 32."""
    if not shape:
        return None
    return next((n for n in range(BLOCK, SMALLEST_BLOCK - 1, -1) if shape[-1] % n == 0), None)


def zeros(shape: tuple[int, ...], wide: jnp.dtype, precision: Precision, signed: bool) -> Moment:
    """A moment of zeros; leaves that are small or do not divide into blocks are kept in the `wide` dtype."""
    block = block_size(shape)
    if precision == 'float32' or math.prod(shape) < SMALL_LEAF or (precision == 'int8' and block is None):
        return jnp.zeros(shape, wide)
    if precision == 'bfloat16':
        return jnp.zeros(shape, jnp.bfloat16)
    assert block is not None
    scale = jnp.zeros((*shape[:-1], shape[-1] // block), jnp.float32)
    return Blocks8(jnp.zeros(shape, jnp.uint8), scale, signed)


def load(moment: Moment, wide: jnp.dtype) -> jax.Array:
    """The values of a moment, in `wide`."""
    if not isinstance(moment, Blocks8):
        return moment.astype(wide)
    codes = moment.codes.astype(jnp.int32)
    level = codes & 127 if moment.signed else codes + 1
    value = _power(level - (127 if moment.signed else 256))
    if moment.signed:
        value = jnp.where(level == 0, 0.0, jnp.where(codes > 127, -value, value))
    return (value * _spread(moment.scale, moment.codes.shape)).astype(wide)


def store(value: jax.Array, like: Moment, salt: jax.Array) -> Moment:
    """Writes values in the form of `like`; equal `salt` (uint32) gives equal rounding."""
    if isinstance(like, Blocks8):
        return _to_blocks(value.astype(jnp.float32), like.signed, salt)
    return round_to(value, like.dtype, salt)


def round_to(value: jax.Array, dtype: jnp.dtype, salt: jax.Array) -> jax.Array:
    """Casts to `dtype`; to bfloat16 by stochastic rounding, so that the expected result is the value itself."""
    if dtype != jnp.bfloat16:
        return value.astype(dtype)
    # bfloat16 is the upper half of float32: adding 16 random bits carries into it as often as the lower half says.
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    kept = ((bits + (_noise(value.shape, salt) & 0xFFFF)) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(kept, jnp.bfloat16)


def _to_blocks(value: jax.Array, signed: bool, salt: jax.Array) -> Blocks8:
    block = block_size(value.shape)
    assert block is not None
    size = jnp.abs(value)
    scale = jnp.max(size.reshape(*value.shape[:-1], value.shape[-1] // block, block), axis=-1)
    share = size * (1 / jnp.where(_spread(scale, value.shape) > 0, _spread(scale, value.shape), 1))
    top = 127 if signed else 256  # levels run from 1 to top; level 0 is zero and exists only among signed codes
    lower = jnp.clip(jnp.floor(top + _PER_OCTAVE * jnp.log2(share)), 0, top).astype(jnp.int32)
    below = jnp.where(lower > 0, _power(lower - top), 0.0)
    above = _power(lower + 1 - top)
    uniform = (_noise(value.shape, salt) >> 8).astype(jnp.float32) * 2.0**-24
    level = jnp.minimum(lower + (share - below > uniform * (above - below)), top)
    if signed:
        codes = jnp.where(value < 0, level + 128, level)
    else:
        codes = jnp.maximum(level, 1) - 1
    return Blocks8(codes.astype(jnp.uint8), scale, signed)


def _power(level: jax.Array) -> jax.Array:
    return jnp.exp2(level.astype(jnp.float32) * (1 / _PER_OCTAVE))


def _spread(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One scale per element from one per block."""
    return jnp.repeat(scale, shape[-1] // scale.shape[-1], axis=-1)


def salt(*numbers: jax.Array | int) -> jax.Array:
    """A uint32 salt from whole numbers, so that neighbouring numbers give unrelated rounding."""
    mixed = jnp.uint32(0)
    for number in numbers:
        mixed = _mix(mixed * jnp.uint32(0x9E3779B9) + jnp.asarray(number).astype(jnp.uint32))
    return mixed


def _noise(shape: tuple[int, ...], salt: jax.Array) -> jax.Array:
    """Random uint32 bits, a hash of (element, salt): free of memory traffic and the same under any sharding."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mix(index * jnp.uint32(0x9E3779B9) + salt)


def _mix(bits: jax.Array) -> jax.Array:
    """The 32-bit finalizer of MurmurHash3 (A. Appleby, public domain)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
