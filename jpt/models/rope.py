"""Rotary position embeddings, as transformers computes them (half-split layout)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jpt.models.config import Rope


def rope_table(
    rope: Rope, head_dim: int, positions_BT: jax.Array, segment_ids_BT: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles, [B, T, head_dim/2], in at least float32.

    'dynamic' looks at the length of each row's segment, so that a text gets the same angles in any batch or packing.

    Source: Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN); the Llama 3.1 release for 'llama3'.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    if rope.kind == 'dynamic':
        inverse_BTH = _dynamic_frequencies(rope, head_dim, positions_BT, segment_ids_BT, dtype)
    else:
        inverse_BTH = jnp.asarray(_frequencies(rope, head_dim), dtype)[None, None, :]
    angles_BTH = positions_BT[..., None].astype(dtype) * inverse_BTH
    factor = _attention_factor(rope)
    return jnp.cos(angles_BTH) * factor, jnp.sin(angles_BTH) * factor


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotate the two halves of the head dimension; the result has the dtype of x.

    `interleaved`: the pairs are neighbours in x and halves apart in the result, since only products of queries with
    keys matter.
    """
    wide = x_BTNH.astype(cos_BTH.dtype)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    # float32 steps on purpose: they are what every published checkpoint was trained with. Each is rounded correctly,
    # which numpy's own float32 power is not: one unit in the last place is an angle off by 0.004 at position 40,000.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    waves = np.power(np.float64(np.float32(theta)), exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / waves


def _frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    base = _base_frequencies(rope.theta, head_dim)
    if rope.kind == 'default':
        return base
    if rope.kind == 'linear':
        return base / np.float32(rope.factor)
    if rope.kind == 'llama3':
        return _llama3_frequencies(rope, base)
    if rope.kind == 'yarn':
        return _yarn_frequencies(rope, head_dim, base)
    raise ValueError(f"Rope.kind={rope.kind!r}: expected 'default', 'linear', 'dynamic', 'yarn' or 'llama3'")


def _llama3_frequencies(rope: Rope, base: np.ndarray) -> np.ndarray:
    """Keep short waves, divide long ones by the factor, blend between."""
    wavelength = 2 * math.pi / base
    ratio = rope.original_length / wavelength
    width = rope.high_freq_factor - rope.low_freq_factor
    # Llama 4 Scout has no width to blend over.
    blend = np.clip((ratio - rope.low_freq_factor) / width, 0.0, 1.0) if width else ratio > rope.high_freq_factor
    return ((1 - blend) * base / rope.factor + blend * base).astype(np.float32)


def _yarn_frequencies(rope: Rope, head_dim: int, base: np.ndarray) -> np.ndarray:
    """Interpolate the dimensions that turn rarely, keep those that turn often, ramp between (YaRN, section 3.2)."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    # In the order of transformers' float32 steps, so that long positions have the same angles.
    kept = 1 - ramp
    return (1 / (rope.factor * (1 / base)) * (1 - kept) + base * kept).astype(np.float32)


def _attention_factor(rope: Rope) -> float:
    if rope.kind != 'yarn':
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _dynamic_frequencies(
    rope: Rope, head_dim: int, positions_BT: jax.Array, segment_ids_BT: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Base grown with the length of the token's segment beyond the original length (NTK-aware scaling)."""
    length = segment_ids_BT.shape[1]
    ends_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, jnp.arange(length)[None, :], length), axis=1, reverse=True)
    longest_BT = jnp.take_along_axis(positions_BT, last_BT, axis=1) + 1
    length_BT = jnp.maximum(longest_BT, rope.original_length).astype(dtype)
    growth_BT = rope.factor * length_BT / rope.original_length - (rope.factor - 1)
    theta_BT = rope.theta * growth_BT ** (head_dim / (head_dim - 2))
    exponent_H = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
    grown_BTH = 1.0 / theta_BT[..., None] ** exponent_H[None, None, :]
    plain_H = jnp.asarray(_base_frequencies(rope.theta, head_dim), dtype)
    return jnp.where((longest_BT > rope.original_length)[..., None], grown_BTH, plain_H[None, None, :])
