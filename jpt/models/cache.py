"""What a model keeps of the tokens it has read, layer by layer; the type of the arrays is its precision.

All rows of a batch write at the same slots. A row's own positions travel beside its keys, and a slot whose segment is
0 (unused, or the padding of a shorter prompt) is never attended, so rows of different length share one program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.kernels.low_precision import E4M3
from jpt.models.config import LayerKind, ModelConfig

# What an attention layer has as parameters where its cache holds codes: the scale [] of keys and that of values. Latent
# attention, whose keys and values are one array, has the first alone.
CACHE_SCALES = ('k_scale', 'v_scale')


class KeysValues(NamedTuple):
    """Of attention: keys [B, K, H, S] and values [B, K, S, H], as the products with them read memory; or their codes.

    See kernels/cached_attention.py. A single row without a stack may leave out B: XLA copies what it has to reshape.
    """

    keys: jax.Array
    values: jax.Array


class Latents(NamedTuple):
    """Of latent attention: for every token its latent and the rotated key that all heads share, [B, S, C]; or codes."""

    latents: jax.Array


class Recurrent(NamedTuple):
    """Of a Mamba layer: the last inputs of its convolutions [B, W - 1, C], the state [B, N, P, Z] in at least float32.

    It takes the place of what was there; `segment_B` is the segment of each row's last token.
    """

    tail_x: jax.Array
    tail_b: jax.Array
    tail_c: jax.Array
    state_BNPZ: jax.Array
    segment_B: jax.Array


Entry = KeysValues | Latents | Recurrent
# Along which axis each array of an entry has slots for tokens; None: it is replaced as a whole.
SLOT_AXES: dict[type, tuple[int | None, ...]] = {KeysValues: (-1, -2), Latents: (-2,), Recurrent: (None,) * 5}


class Cache(NamedTuple):
    """The entries of all layers, stacked as the parameters are.

    The arrays of `layers[segment][kind]` have a leading axis [R]; not where it is 1.
    """

    layers: list[list[Any]]
    positions_BS: jax.Array  # int32
    segments_BS: jax.Array  # int32, 0 = unused slot
    next_slot: jax.Array  # int32 scalar


class LayerCache(NamedTuple):
    """The entry of one layer kind, and which layer of the stack is meant (None: there is no stack)."""

    entry: Any
    repeat: jax.Array | None
    slot: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array

    def write(self, new: Entry) -> 'LayerCache':
        """The cache with the new tokens' arrays at the next slots of this layer."""
        axes = SLOT_AXES[type(new)]
        written = [self._written(*arrays) for arrays in zip(self.entry, new, axes, strict=True)]
        return self._replace(entry=type(new)(*written))

    def _written(self, held: jax.Array, new: jax.Array, slot_axis: int | None) -> jax.Array:
        start = [jnp.zeros((), jnp.int32)] * held.ndim
        if slot_axis is not None:
            start[slot_axis] = self.slot
        if self.repeat is not None:
            start[0] = self.repeat
        shape = (1,) * (held.ndim - new.ndim) + new.shape[max(new.ndim - held.ndim, 0) :]
        return jax.lax.dynamic_update_slice(held, new.reshape(shape).astype(held.dtype), start)

    def read(self) -> Any:
        """The entry of this layer alone, with its batch axis."""
        if self.repeat is not None:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.repeat, keepdims=False), self.entry)
        if isinstance(self.entry, KeysValues) and self.entry.keys.ndim == 3:
            return KeysValues(self.entry.keys[None], self.entry.values[None])
        return self.entry


def init_cache(cfg: ModelConfig, batch: int, slots: int, dtype: DTypeLike) -> Cache:
    """An empty cache for `batch` rows of up to `slots` tokens; keys and values in `dtype`, or codes (cfg.kv_cache)."""

    def empty(kind: LayerKind, repeats: int) -> Any:
        entry = _empty_entry(cfg, kind, batch, slots, dtype)
        return jax.tree.map(lambda x: jnp.zeros((repeats, *x.shape), x.dtype), entry) if repeats > 1 else entry

    return Cache(
        layers=[[empty(kind, segment.repeats) for kind in segment.kinds] for segment in cfg.segments],
        positions_BS=jnp.zeros((batch, slots), jnp.int32),
        segments_BS=jnp.zeros((batch, slots), jnp.int32),
        next_slot=jnp.zeros((), jnp.int32),
    )


def _empty_entry(cfg: ModelConfig, kind: LayerKind, batch: int, slots: int, dtype: DTypeLike) -> Any:
    if kind.mixer == 'none':
        return ()
    if kind.mixer == 'mamba':
        space = cfg.state_space
        assert space is not None
        grouped = space.groups * space.state_dim
        x, b, c = (jnp.zeros((batch, space.conv_width - 1, width), dtype) for width in (space.width, grouped, grouped))
        wide = jnp.promote_types(dtype, jnp.float32)
        state = jnp.zeros((batch, space.num_heads, space.head_dim, space.state_dim), wide)
        return Recurrent(x, b, c, state, jnp.zeros(batch, jnp.int32))
    if cfg.kv_cache == 'fp8':
        dtype = E4M3
    if cfg.latent is not None:
        return Latents(jnp.zeros((batch, slots, cfg.latent.rank + cfg.latent.rope_dim), dtype))
    keys = jnp.zeros((batch, cfg.num_kv_heads, cfg.head_dim, slots), dtype)
    return KeysValues(keys, keys.swapaxes(-1, -2))


def admit(cache: Cache, positions_BT: jax.Array, segments_BT: jax.Array) -> Cache:
    """The cache with the positions and segments of the tokens that are about to be written."""
    start = (jnp.zeros((), jnp.int32), cache.next_slot)
    return cache._replace(
        positions_BS=jax.lax.dynamic_update_slice(cache.positions_BS, positions_BT.astype(jnp.int32), start),
        segments_BS=jax.lax.dynamic_update_slice(cache.segments_BS, segments_BT.astype(jnp.int32), start),
    )
