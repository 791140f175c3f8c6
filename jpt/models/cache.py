"""Keys and values of the tokens a model has read; the type of the cache is its precision.

All rows of a batch write at the same slots. A row's own positions travel beside its keys, and a slot whose segment is
0 (unused, or the padding of a shorter prompt) is never attended, so rows of different length share one program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of every layer, stacked as the parameters are: `keys[segment][kind]` is [R, B, S, K, H]."""

    keys: list[list[jax.Array]]
    values: list[list[jax.Array]]
    positions_BS: jax.Array  # int32
    segments_BS: jax.Array  # int32, 0 = unused slot
    next_slot: jax.Array  # int32 scalar


class LayerCache(NamedTuple):
    """The stacked keys and values of one layer kind, and which layer of the stack is meant."""

    keys_RBSKH: jax.Array
    values_RBSKH: jax.Array
    repeat: jax.Array
    slot: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array) -> 'LayerCache':
        """The cache with the new tokens' keys and values at the next slots of this layer."""
        zero = jnp.zeros((), jnp.int32)
        start = (self.repeat, zero, self.slot, zero, zero)
        dtype = self.keys_RBSKH.dtype
        return self._replace(
            keys_RBSKH=jax.lax.dynamic_update_slice(self.keys_RBSKH, keys_BTKH[None].astype(dtype), start),
            values_RBSKH=jax.lax.dynamic_update_slice(self.values_RBSKH, values_BTKH[None].astype(dtype), start),
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of this layer."""
        keys = jax.lax.dynamic_index_in_dim(self.keys_RBSKH, self.repeat, keepdims=False)
        values = jax.lax.dynamic_index_in_dim(self.values_RBSKH, self.repeat, keepdims=False)
        return keys, values


def init_cache(cfg: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of up to `slots` tokens."""

    def stacks() -> list[list[jax.Array]]:
        shape = (batch, slots, cfg.num_kv_heads, cfg.head_dim)
        return [[jnp.zeros((s.repeats, *shape), dtype) for _ in s.kinds] for s in cfg.segments]

    return KVCache(
        keys=stacks(),
        values=stacks(),
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
