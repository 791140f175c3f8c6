"""The small modules every model is made of: linear map, norms."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import typing as flax_typing

from jpt.kernels.local_products import Pieces
from jpt.models.config import ModelConfig
from jpt.quant.dot import dot
from jpt.quant.producers import Deferred, Given, Normed, recomputed
from jpt.quant.statistics import observe


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """The vector [n] shaped to be added to or multiplied with `like` [..., n]."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nn.Module):
    """y = x W^T (+ b), with W stored (out, in); the type of the weight decides how the product is computed.

    Shapes: x [..., in] -> [..., features], in the dtype of x. What several layers read is best given to all of them as
    one Deferred: what a weight makes of it is then made once.
    """

    features: int
    use_bias: bool = False
    residual_scale: float = 1.0  # initial size of a kernel that writes into the residual stream
    pieces: Pieces = Pieces()  # heads or channels, which a mesh divides as jpt/sharding/rules.py does

    @nn.compact
    def __call__(self, x: jax.Array | Deferred) -> jax.Array:
        shape = (self.features, x.shape[-1])
        if self.is_initializing():
            init = nn.initializers.variance_scaling(self.residual_scale**2, 'fan_in', 'normal', in_axis=-1, out_axis=-2)
            kernel = self.param('kernel', init, shape)
        else:
            # Linen compares the first leaf with the initializer's shape, which packed weight types do not have.
            kernel = self.get_variable('params', 'kernel')
        if kernel.shape != shape:
            raise ValueError(f'{self.scope_path()}kernel has shape {kernel.shape}: expected (out, in) = {shape}')
        y = dot(x, kernel, pieces=self.pieces)
        observe(self, x, y)
        if self.use_bias:
            bias = self.param('bias', nn.initializers.zeros, (self.features,))
            y = y + along_last(bias.astype(y.dtype), y)
        return y

    def scope_path(self) -> str:
        """The place of this module in the tree, for messages."""
        return ''.join(f'{name}/' for name in self.path)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), with statistics in at least float32; the result has the dtype of x."""

    eps: float
    offset: float = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.deferred(x).dense()

    @nn.compact
    def deferred(self, x: jax.Array) -> Normed:
        """For linear layers that may fuse it with what they make of their inputs."""
        initial: flax_typing.Initializer = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param('scale', initial, (x.shape[-1],))
        return Normed(x, scale, self.eps, self.offset)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, with statistics in at least float32; the result has the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        return recomputed(partial(_layer_norm, eps=self.eps))(x, scale, bias)

    def deferred(self, x: jax.Array) -> Given:
        """Likewise; nothing fuses with it."""
        return Given(self(x))


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, with statistics in at least float32; the result has the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scaled = normed * along_last(scale.astype(wide.dtype), wide) + along_last(bias.astype(wide.dtype), wide)
    return scaled.astype(x.dtype)


def norm(cfg: ModelConfig, name: str) -> RMSNorm | LayerNorm:
    """The model's normalization of hidden states."""
    if cfg.norm == 'layer':
        return LayerNorm(cfg.norm_eps, name=name)
    return RMSNorm(cfg.norm_eps, cfg.norm_offset, name=name)
