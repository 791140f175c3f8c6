"""What a query may see, element by element and block by block."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """The rule: a key is visible when its segment equals the query's and is not 0 and all that is set here holds.

    causal: the key's position is not later than the query's.
    window: query position - key position < window (a query sees itself and window - 1 keys before it).
    chunk: query and key positions lie in the same run of `chunk` positions (position // chunk is equal).
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None


class Places(NamedTuple):
    """Where the tokens stand: int32 positions and segments of the queries [..., T] and of the keys [..., S]."""

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array
    k_segments: jax.Array


def visible(places: Places, mask: Mask):
    """Which key each query sees: bool [..., T, S]."""
    q_pos, k_pos = places.q_positions[..., :, None], places.k_positions[..., None, :]
    q_seg, k_seg = places.q_segments[..., :, None], places.k_segments[..., None, :]
    seen = (q_seg == k_seg) & (q_seg != 0)
    if mask.causal:
        seen &= k_pos <= q_pos
    if mask.window is not None:
        seen &= q_pos - k_pos < mask.window
    if mask.chunk is not None:
        seen &= q_pos // mask.chunk == k_pos // mask.chunk
    return seen


class _Range(NamedTuple):
    """First and last token of a block in the order (segment, position), and its range of positions; [..., blocks]."""

    first_segment: jax.Array
    last_segment: jax.Array
    first_position: jax.Array
    last_position: jax.Array
    low_position: jax.Array
    high_position: jax.Array


_FAR = jnp.iinfo(jnp.int32).max


def _range(positions, segments) -> _Range:
    """Summary of blocks [..., blocks, size]; an all-padding block gets an empty range (first after last)."""
    real = segments != 0
    first = jnp.min(jnp.where(real, segments, _FAR), axis=-1)
    last = jnp.max(jnp.where(real, segments, -_FAR), axis=-1)
    low = jnp.min(jnp.where(real, positions, _FAR), axis=-1)
    high = jnp.max(jnp.where(real, positions, -_FAR), axis=-1)
    in_first = real & (segments == first[..., None])
    in_last = real & (segments == last[..., None])
    first_position = jnp.min(jnp.where(in_first, positions, _FAR), axis=-1)
    last_position = jnp.max(jnp.where(in_last, positions, -_FAR), axis=-1)
    return _Range(first, last, first_position, last_position, low, high)


def needed(places: Places, mask: Mask):
    """Which blocks of keys a block of queries may see: bool [..., q_blocks, k_blocks] from places split in blocks.

    `places` holds [..., q_blocks, q_size] and [..., k_blocks, k_size]. The answer never misses a visible pair; it may
    hold blocks without one. In the order (segment, position) a visible key is not after its query, so for packed rows
    the test is exact up to the size of a block: documents and the upper triangle cost nothing.
    """
    q = _Range(*(x[..., :, None] for x in _range(places.q_positions, places.q_segments)))
    k = _Range(*(x[..., None, :] for x in _range(places.k_positions, places.k_segments)))
    need = (q.first_segment <= k.last_segment) & (k.first_segment <= q.last_segment)
    if mask.causal:
        need &= (k.first_segment < q.last_segment) | (k.first_position <= q.last_position)
    if mask.window is not None:
        need &= (k.last_segment > q.first_segment) | (q.first_position < mask.window + k.last_position)
    if mask.chunk is not None:
        need &= q.low_position // mask.chunk <= k.high_position // mask.chunk
        need &= k.low_position // mask.chunk <= q.high_position // mask.chunk
    return need
