"""Keys and values of the tokens a model has read; the type of the cache is its precision.

Keys lie as [B, K, H, S] and values as [B, K, S, H], as the products with them read memory (see cached_attention.py).
All rows of a batch write at the same slots. A row's own positions travel beside its keys, and a slot whose segment is
0 (unused, or the padding of a shorter prompt) is never attended, so rows of different length share one program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of every layer, stacked as the parameters are.

    `keys[segment][kind]` is [R, B, K, H, S] and `values[segment][kind]` [R, B, K, S, H]; without R where it is 1. A
    single row without a stack may leave out B as well: XLA copies what it has to reshape.
    """

    keys: list[list[jax.Array]]
    values: list[list[jax.Array]]
    positions_BS: jax.Array  # int32
    segments_BS: jax.Array  # int32, 0 = unused slot
    next_slot: jax.Array  # int32 scalar


class LayerCache(NamedTuple):
    """The keys and values of one layer kind, and which layer of the stack is meant (None: there is no stack)."""

    keys: jax.Array
    values: jax.Array
    repeat: jax.Array | None
    slot: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array) -> 'LayerCache':
        """The cache with the new tokens' keys and values at the next slots of this layer."""
        keys_BKHT, values_BKTH = keys_BTKH.transpose(0, 2, 3, 1), values_BTKH.transpose(0, 2, 1, 3)
        return self._replace(
            keys=self._written(self.keys, keys_BKHT, slot_axis=-1),
            values=self._written(self.values, values_BKTH, slot_axis=-2),
        )

    def _written(self, held: jax.Array, new: jax.Array, slot_axis: int) -> jax.Array:
        start = [jnp.zeros((), jnp.int32)] * held.ndim
        start[slot_axis] = self.slot
        if self.repeat is not None:
            start[0] = self.repeat
        shape = (1,) * (held.ndim - new.ndim) + new.shape[max(new.ndim - held.ndim, 0) :]
        return jax.lax.dynamic_update_slice(held, new.reshape(shape).astype(held.dtype), start)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys [B, K, H, S] and values [B, K, S, H] of this layer."""
        if self.repeat is not None:
            at = jax.lax.dynamic_index_in_dim
            return at(self.keys, self.repeat, keepdims=False), at(self.values, self.repeat, keepdims=False)
        if self.keys.ndim == 3:
            return self.keys[None], self.values[None]
        return self.keys, self.values


def init_cache(cfg: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of up to `slots` tokens."""

    def stacks(*shape: int) -> list[list[jax.Array]]:
        shape = (batch, cfg.num_kv_heads, *shape)
        stacked = [(s.repeats, *shape) if s.repeats > 1 else shape for s in cfg.segments]
        return [[jnp.zeros(whole, dtype) for _ in s.kinds] for s, whole in zip(cfg.segments, stacked, strict=True)]

    return KVCache(
        keys=stacks(cfg.head_dim, slots),
        values=stacks(slots, cfg.head_dim),
        positions_BS=jnp.zeros((batch, slots), jnp.int32),
        segments_BS=jnp.zeros((batch, slots), jnp.int32),
        next_slot=jnp.zeros((), jnp.int32),
    )


def admit(cache: KVCache, positions_BT: jax.Array, segments_BT: jax.Array) -> KVCache:
    """The cache with the positions and segments of the tokens that are about to be written."""
    start = (jnp.zeros((), jnp.int32), cache.next_slot)
    return cache._replace(
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT.astype(jnp.int32), start),
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT.astype(jnp.int32), start),
    )
