"""The attention part of a layer: projections, per-head norms, rotary embedding, cache."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpt.kernels.attention import attention
from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.cached_attention import FEW_QUERIES, cached_attention
from jpt.kernels.local_products import Pieces
from jpt.kernels.masks import Mask, Places
from jpt.models.cache import KeysValues, LayerCache
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Temperature
from jpt.models.layers import Linear, RMSNorm, unit_rms
from jpt.models.rope import apply_rope
from jpt.quant.producers import Deferred


class Where(NamedTuple):
    """Where the tokens of a batch stand: positions and segments [B, T], and the angles of each rotary embedding."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    ropes: tuple[tuple[jax.Array, jax.Array], ...]  # in the order of cfg.ropes()

    def rope(self, cfg: ModelConfig, rope: Rope) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine [B, T, H/2] of one of the model's rotary embeddings."""
        return self.ropes[cfg.ropes().index(rope)]


class Attention(nn.Module):
    """Grouped-query attention. [B, T, D] -> [B, T, D], and the cache with the new keys and values."""

    cfg: ModelConfig
    kind: LayerKind
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Deferred, where: Where, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        cfg, kind, place = self.cfg, self.kind, self.compute.place
        batch, length = x_BTD.shape[:2]

        def heads(name: str, count: int) -> jax.Array:
            flat = Linear(count * cfg.head_dim, cfg.qkv_bias, pieces=Pieces(out=count), name=name)(x_BTD)
            if cfg.qk_norm and cfg.qk_norm_over_heads and name != 'v':
                flat = RMSNorm(cfg.norm_eps, cfg.norm_offset, name=f'{name}_norm')(flat)
            return place(flat.reshape(batch, length, count, cfg.head_dim), ('batch', 'length', 'heads', None))

        q_BTNH, k_BTKH, v_BTKH = heads('q', cfg.num_heads), heads('k', cfg.num_kv_heads), heads('v', cfg.num_kv_heads)
        if cfg.qk_norm and not cfg.qk_norm_over_heads:
            q_BTNH = RMSNorm(cfg.norm_eps, cfg.norm_offset, name='q_norm')(q_BTNH)
            k_BTKH = RMSNorm(cfg.norm_eps, cfg.norm_offset, name='k_norm')(k_BTKH)
        if kind.rope is not None:
            cos, sin = where.rope(cfg, kind.rope)
            q_BTNH, k_BTKH = (apply_rope(x, cos, sin, kind.rope.interleaved) for x in (q_BTNH, k_BTKH))
        if kind.unit_qk:
            q_BTNH, k_BTKH = (unit_rms(x, cfg.norm_eps) for x in (q_BTNH, k_BTKH))
        if kind.temperature is not None:
            q_BTNH = _tempered(q_BTNH, where.positions_BT, kind.temperature)
        q_BTNH = checkpoint_name(q_BTNH, 'query')
        k_BTKH, v_BTKH = checkpoint_name(k_BTKH, 'key'), checkpoint_name(v_BTKH, 'value')
        if cache is not None:
            cache = cache.write(KeysValues(k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)))
        sinks_N = self.param('sinks', nn.initializers.zeros, (cfg.num_heads,)) if cfg.sinks else None
        out_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, where, cache)
        out_BTD = checkpoint_name(out_BTNH, 'attention').reshape(batch, length, cfg.num_heads * cfg.head_dim)
        size, pieces = (2 * cfg.num_layers) ** -0.5, Pieces(inner=cfg.num_heads)
        return Linear(cfg.width, cfg.attention_out_bias, size, pieces, name='out')(out_BTD), cache

    def _attend(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        sinks_N: jax.Array | None,
        where: Where,
        cache: LayerCache | None,
    ) -> jax.Array:
        """Attention [B, T, N, H] of the tokens to themselves, or to all of a cache that holds them."""
        cfg, kind, implementation = self.cfg, self.kind, self.compute.attention
        scale = cfg.scale if kind.attention_scale is None else kind.attention_scale
        k_positions, k_segments = where.positions_BT, where.segments_BT
        if cache is not None:
            k_positions, k_segments = cache.positions_BS, cache.segments_BS
            k_BKHS, v_BKSH = cache.read()
            if implementation == 'auto' and q_BTNH.shape[1] <= FEW_QUERIES:
                places = Places(where.positions_BT, k_positions, where.segments_BT, k_segments)
                rule = Scores(Mask(window=kind.window, chunk=kind.chunk), scale, cfg.attention_soft_cap)
                return cached_attention(q_BTNH, k_BKHS, v_BKSH, places, rule, sinks_N)
            k_BTKH, v_BTKH = k_BKHS.transpose(0, 3, 1, 2), v_BKSH.transpose(0, 2, 1, 3)
        return attention(
            q_BTNH,
            k_BTKH.astype(q_BTNH.dtype),
            v_BTKH.astype(q_BTNH.dtype),
            q_positions_BT=where.positions_BT,
            k_positions_BS=k_positions,
            q_segments_BT=where.segments_BT,
            k_segments_BS=k_segments,
            causal=cfg.causal,
            window=kind.window,
            chunk=kind.chunk,
            soft_cap=cfg.attention_soft_cap,
            scale=scale,
            sinks_N=sinks_N,
            implementation=implementation,
        )


def _tempered(q_BTNH: jax.Array, positions_BT: jax.Array, temperature: Temperature) -> jax.Array:
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    steps_BT = jnp.floor((positions_BT.astype(wide) + 1) / temperature.floor)
    factor_BT = 1 + temperature.scale * jnp.log1p(steps_BT)
    return (q_BTNH * factor_BT[..., None, None]).astype(q_BTNH.dtype)
