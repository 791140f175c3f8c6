"""Deferred producers: what linear layers read, not yet computed, so that a weight may fuse it with its own rounding.

A norm hands on `Normed`, a gated MLP `Gated`, anything else is `Given`. Each means the array of `dense`; a weight whose
inputs are rounded in blocks of 128 takes `codes` instead, made in one pass over what the array would be made of, with
the bits that rounding the array gives. Both are computed once for all layers that read them (q, k, v; gate, up): what
was made is kept with the producer, for the trace that it lives in.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.block_quantize import DTYPES, quantize_gated, quantize_normed, quantize_rows, silu_gated
from jpt.kernels.local_products import Lies, rounded
from jpt.quant.alike import Alike


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, of which the backward pass keeps the arguments only and computes the rest again.

    For elementwise work, which costs less than to write and read what autodiff would keep of it: of a norm wide copies
    of its input, of an activation several arrays of a layer's widest kind.
    """
    return jax.checkpoint(function, prevent_cse=False)


@dataclasses.dataclass(frozen=True)
class Deferred(Alike):
    """An input of linear layers [..., in]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, '_made', {})  # no field: it stays behind where a transformation takes this apart

    def dense(self) -> jax.Array:
        """The array itself; gradients go through it."""
        return self.once('dense', self._dense)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, called for the first reader with this key. All readers are in one trace."""
        kept: dict[Hashable, Any] = vars(self)['_made']
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def codes(self, scale: str, where: Lies) -> tuple[jax.Array, jax.Array]:
        """Codes and scales per 128 of `in`, as `quantize_rows` gives them of the array; no gradient goes through."""
        return rounded(partial(quantize_rows, scale=scale), (lax.stop_gradient(self.dense()),), where)

    @abc.abstractmethod
    def _dense(self) -> jax.Array:
        """What `dense` keeps."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given(Deferred):
    """An array that is there already."""

    array: jax.Array

    @property
    def _like(self) -> jax.Array:
        return self.array

    def _dense(self) -> jax.Array:
        return self.array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed(Deferred):
    """RMSNorm: x [..., in] / rms(x) * (offset + scale [in])."""

    x: jax.Array
    scale: jax.Array
    eps: float = dataclasses.field(metadata={'static': True})
    offset: float = dataclasses.field(default=0.0, metadata={'static': True})

    @property
    def _like(self) -> jax.Array:
        return self.x

    def _dense(self) -> jax.Array:
        return recomputed(partial(_rms_norm, eps=self.eps, offset=self.offset))(self.x, self.scale)

    def codes(self, scale: str, where: Lies) -> tuple[jax.Array, jax.Array]:
        if self.x.dtype.name not in DTYPES or where.inner:  # a shard has no mean of squares of all inputs
            return super().codes(scale, where)
        weight = self.offset + lax.stop_gradient(self.scale).astype(jnp.float32)
        make = partial(quantize_normed, eps=self.eps, scale=scale)
        return rounded(make, (lax.stop_gradient(self.x),), where, weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated(Deferred):
    """What a gated MLP makes of gate and up, both [..., in]: `unit` of them. That of SwiGLU is `silu_gated`."""

    gate: jax.Array
    up: jax.Array
    unit: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(metadata={'static': True})

    @property
    def _like(self) -> jax.Array:
        return self.up

    def _dense(self) -> jax.Array:
        return recomputed(self.unit)(self.gate, self.up)

    def codes(self, scale: str, where: Lies) -> tuple[jax.Array, jax.Array]:
        if self.unit is not silu_gated or self.up.dtype.name not in DTYPES:
            return super().codes(scale, where)
        both = lax.stop_gradient(self.gate), lax.stop_gradient(self.up)
        return rounded(partial(quantize_gated, scale=scale), both, where)


def dense_of(x: jax.Array | Deferred) -> jax.Array:
    """An input of a linear layer as an array."""
    return x.dense() if isinstance(x, Deferred) else x


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float) -> jax.Array:
    """Statistics in at least float32; rounded once, to the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    factor = offset + scale.astype(wide.dtype)
    return (normed * factor.reshape((1,) * (wide.ndim - 1) + factor.shape)).astype(x.dtype)
