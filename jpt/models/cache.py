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

    `keys[segment][kind]` is [R, B, K, H, S] and `values[segment][kind]` [R, B, K, S, H].
    """

    keys: list[list[jax.Array]]
    values: list[list[jax.Array]]
    positions_BS: jax.Array  # int32
    segments_BS: jax.Array  # int32, 0 = unused slot
    next_slot: jax.Array  # int32 scalar


class LayerCache(NamedTuple):
    """The stacked keys and values of one layer kind, and which layer of the stack is meant."""

    keys_RBKHS: jax.Array
    values_RBKSH: jax.Array
    repeat: jax.Array
    slot: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array) -> 'LayerCache':
        """The cache with the new tokens' keys and values at the next slots of this layer."""
        zero, dtype = jnp.zeros((), jnp.int32), self.keys_RBKHS.dtype
        keys_RBKHT = keys_BTKH.transpose(0, 2, 3, 1)[None].astype(dtype)
        values_RBKTH = values_BTKH.transpose(0, 2, 1, 3)[None].astype(dtype)
        update = jax.lax.dynamic_update_slice
        return self._replace(
            keys_RBKHS=update(self.keys_RBKHS, keys_RBKHT, (self.repeat, zero, zero, zero, self.slot)),
            values_RBKSH=update(self.values_RBKSH, values_RBKTH, (self.repeat, zero, zero, self.slot, zero)),
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys [B, K, H, S] and values [B, K, S, H] of this layer."""
        keys_BKHS = jax.lax.dynamic_index_in_dim(self.keys_RBKHS, self.repeat, keepdims=False)
        values_BKSH = jax.lax.dynamic_index_in_dim(self.values_RBKSH, self.repeat, keepdims=False)
        return keys_BKHS, values_BKSH


def init_cache(cfg: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of up to `slots` tokens."""

    def stacks(*shape: int) -> list[list[jax.Array]]:
        return [[jnp.zeros((s.repeats, batch, cfg.num_kv_heads, *shape), dtype) for _ in s.kinds] for s in cfg.segments]

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
