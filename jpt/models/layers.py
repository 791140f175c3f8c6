"""The small modules every model is made of: linear map, norms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import typing as flax_typing

from jpt.models.config import ModelConfig
from jpt.quant.dot import dot


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """The vector [n] shaped to be added to or multiplied with `like` [..., n]."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nn.Module):
    """y = x W^T (+ b), with W stored (out, in); the type of the weight decides how the product is computed.

    Shapes: x [..., in] -> [..., features], in the dtype of x.
    """

    features: int
    use_bias: bool = False
    residual_scale: float = 1.0  # initial size of a kernel that writes into the residual stream

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.features, x.shape[-1])
        if self.is_initializing():
            init = nn.initializers.variance_scaling(self.residual_scale**2, 'fan_in', 'normal', in_axis=-1, out_axis=-2)
            kernel = self.param('kernel', init, shape)
        else:
            # Linen compares the first leaf with the initializer's shape, which packed weight types do not have.
            kernel = self.get_variable('params', 'kernel')
        if kernel.shape != shape:
            raise ValueError(f'{self.scope_path()}kernel has shape {kernel.shape}: expected (out, in) = {shape}')
        y = dot(x, kernel)
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initial: flax_typing.Initializer = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param('scale', initial, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (normed * along_last(self.offset + scale.astype(wide.dtype), wide)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, with statistics in at least float32; the result has the dtype of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        scaled = normed * along_last(scale.astype(wide.dtype), wide) + along_last(bias.astype(wide.dtype), wide)
        return scaled.astype(x.dtype)


def norm(cfg: ModelConfig, name: str) -> nn.Module:
    """The model's normalization of hidden states."""
    if cfg.norm == 'layer':
        return LayerNorm(cfg.norm_eps, name=name)
    return RMSNorm(cfg.norm_eps, cfg.norm_offset, name=name)
