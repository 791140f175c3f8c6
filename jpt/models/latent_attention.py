"""Multi-head latent attention: keys and values of all heads are made from one small latent per token.

DeepSeek-V2 (2024), section 2.1. With a cache only the latent and the shared rotary key are kept; a few new tokens are
computed on the latents themselves (the absorbed form), where the maps to keys and from values are applied to queries
and outputs instead.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jpt.kernels.attention import attention
from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.cached_attention import FEW_QUERIES, cached_attention
from jpt.kernels.local_products import Pieces
from jpt.kernels.masks import Mask, Places
from jpt.models.attention import Where
from jpt.models.cache import Latents, LayerCache
from jpt.models.config import Compute, LayerKind, ModelConfig
from jpt.models.layers import Linear, RMSNorm
from jpt.models.rope import apply_rope
from jpt.quant.dot import dense
from jpt.quant.producers import Deferred


class LatentAttention(nn.Module):
    """[B, T, D] -> [B, T, D], and the cache with the new tokens' latents."""

    cfg: ModelConfig
    kind: LayerKind
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: Deferred, where: Where, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        cfg, latent, place = self.cfg, self.cfg.latent, self.compute.place
        assert latent is not None
        batch, length = x_BTD.shape[:2]
        if latent.query_rank is None:
            flat = Linear(cfg.num_heads * cfg.head_dim, pieces=Pieces(out=cfg.num_heads), name='q')(x_BTD)
        else:
            q_BTR = Linear(latent.query_rank, cfg.qkv_bias, name='q_down')(x_BTD)
            read_BTR = RMSNorm(latent.norm_eps, name='q_norm').deferred(q_BTR)
            flat = Linear(cfg.num_heads * cfg.head_dim, pieces=Pieces(out=cfg.num_heads), name='q_up')(read_BTR)
        q_BTNH = place(flat.reshape(batch, length, cfg.num_heads, cfg.head_dim), ('batch', 'length', 'heads', None))
        q_BTNH = checkpoint_name(self._rotated(q_BTNH, latent.nope_dim, where), 'query')

        down_BTC = Linear(latent.rank + latent.rope_dim, cfg.qkv_bias, name='kv_down')(x_BTD)
        normed_BTR = RMSNorm(latent.norm_eps, name='kv_norm')(down_BTC[..., : latent.rank])
        shared_BT1H = self._rotated(down_BTC[:, :, None, latent.rank :], 0, where)
        latents_BTC = checkpoint_name(jnp.concatenate([normed_BTR, shared_BT1H[:, :, 0]], axis=-1), 'key')
        if cache is not None:
            cache = cache.write(Latents(latents_BTC))
        out_BTNH = checkpoint_name(self._attend(q_BTNH, latents_BTC, where, cache), 'attention')
        out_BTF = out_BTNH.reshape(batch, length, cfg.num_heads * latent.value_dim)
        size, pieces = (2 * cfg.num_layers) ** -0.5, Pieces(inner=cfg.num_heads)
        return Linear(cfg.width, cfg.attention_out_bias, size, pieces, name='out')(out_BTF), cache

    def _rotated(self, x_BTNH: jax.Array, first: int, where: Where) -> jax.Array:
        """Heads with the dimensions from `first` on rotated."""
        if self.kind.rope is None:
            return x_BTNH
        rope = self.kind.rope
        rotated = apply_rope(x_BTNH[..., first:], *where.rope(self.cfg, rope), rope.interleaved)
        return jnp.concatenate([x_BTNH[..., :first], rotated], axis=-1) if first else rotated

    def _attend(self, q_BTNH: jax.Array, latents_BTC: jax.Array, where: Where, cache: LayerCache | None) -> jax.Array:
        """Attention [B, T, N, value_dim] of the tokens to themselves, or to all of a cache that holds them."""
        cfg, latent, kind = self.cfg, self.cfg.latent, self.kind
        assert latent is not None
        scale = cfg.scale if kind.attention_scale is None else kind.attention_scale
        width, pieces = cfg.num_heads * (latent.nope_dim + latent.value_dim), Pieces(out=cfg.num_heads)
        up = Linear(width, pieces=pieces, name='kv_up')
        latents_BSC, positions_BS, segments_BS = latents_BTC, where.positions_BT, where.segments_BT
        if cache is not None:
            latents_BSC = cache.read().latents.astype(q_BTNH.dtype)
            positions_BS, segments_BS = cache.positions_BS, cache.segments_BS
            if self.compute.attention == 'auto' and q_BTNH.shape[1] <= FEW_QUERIES:
                places = Places(where.positions_BT, positions_BS, where.segments_BT, segments_BS)
                return self._absorbed(q_BTNH, latents_BSC, places, Scores(Mask(window=kind.window), scale))
        both = up(latents_BSC[..., : latent.rank])
        both_BSNH = self.compute.place(
            both.reshape(*both.shape[:2], cfg.num_heads, -1), ('batch', 'length', 'heads', None)
        )
        shared = jnp.broadcast_to(latents_BSC[:, :, None, latent.rank :], (*both_BSNH.shape[:3], latent.rope_dim))
        return attention(
            q_BTNH,
            jnp.concatenate([both_BSNH[..., : latent.nope_dim], shared], axis=-1),
            checkpoint_name(both_BSNH[..., latent.nope_dim :], 'value'),
            q_positions_BT=where.positions_BT,
            k_positions_BS=positions_BS,
            q_segments_BT=where.segments_BT,
            k_segments_BS=segments_BS,
            window=kind.window,
            scale=scale,
            implementation=self.compute.attention,
        )

    def _absorbed(self, q_BTNH: jax.Array, latents_BSC: jax.Array, places: Places, rule: Scores) -> jax.Array:
        """Attention on the latents: one key head of rank + rope_dim, whose first `rank` dimensions are the value."""
        latent, heads = self.cfg.latent, self.cfg.num_heads
        assert latent is not None
        kernel = dense(self.variables['params']['kv_up']['kernel']).astype(q_BTNH.dtype)
        kernel_NHR = kernel.reshape(heads, -1, latent.rank)
        to_latent, from_latent = kernel_NHR[:, : latent.nope_dim], kernel_NHR[:, latent.nope_dim :]
        q_BTNR = jnp.einsum('btnh,nhr->btnr', q_BTNH[..., : latent.nope_dim], to_latent)
        q_BTNC = jnp.concatenate([q_BTNR, q_BTNH[..., latent.nope_dim :]], axis=-1)
        keys, values = latents_BSC.swapaxes(1, 2)[:, None], latents_BSC[:, None, :, : latent.rank]
        return jnp.einsum('btnr,nhr->btnh', cached_attention(q_BTNC, keys, values, places, rule), from_latent)
