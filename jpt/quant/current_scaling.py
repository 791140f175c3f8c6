"""FP8 training with one scale per array, found anew at every step: weights and inputs E4M3, gradients of outputs E5M2.

    scale = amax / 448 (E5M2: 57344), code = round(x / scale), and all three products multiply codes as they are:
    y = x w^T        dx = dy w        dw = dy^T x

(Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433; Transformer Engine calls it current scaling
in the hybrid format.) On Hopper each is one call of cuBLASLt, if XLA's Triton products are off: the preset 'fp8' of
jpt/training/xla_flags.py. Products of groups multiply the numbers in x's dtype.

The amax is of the array as the program sees it: under automatic axes of a mesh of all of it, inside a shard_map (the
loop over microbatches is manual in data and context) of the shard's tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpt.kernels import low_precision as low
from jpt.kernels.local import platform
from jpt.kernels.local_products import Lies
from jpt.quant.gradients import by_group_of_inputs, by_group_of_weights
from jpt.quant.tensors import QTensor


def with_current_scale(weight: QTensor, x: jax.Array, sizes_E: jax.Array | None) -> QTensor:
    """The weight with the `input_scale` of these inputs [..., in]; rows beyond all groups do not count."""
    lead = () if sizes_E is None else sizes_E.shape
    return dataclasses.replace(weight, input_scale=jnp.broadcast_to(_scale(_own(x, sizes_E), low.E4M3_MAX), lead))


def tensor_gradients(
    x: jax.Array, weight: QTensor, sizes_E: jax.Array | None, where: Lies | None, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x [..., in] (in its dtype) and of the weight (float32) from that of the product, dy [..., out].

    Args:
        x: as the product had it, before it was rounded.
        weight: E4M3 with one scale, and the `input_scale` of the forward product.
        sizes_E: where there are groups, how many rows of x [M, in] each has.
        where: the compiler places these products itself.
        dy: finite; a NaN or infinity makes all of both NaN.
    """
    dy = _own(dy, sizes_E)
    scale_dy = _scale(dy, low.E5M2_MAX)
    codes_dy = low.to_e5m2(low.exact_divide(dy.astype(jnp.float32), scale_dy))
    scale_x = jnp.asarray(weight.input_scale).reshape(-1)[0]
    codes_x = low.to_e4m3(low.exact_divide(_own(x, sizes_E).astype(jnp.float32), scale_x))
    if sizes_E is not None:
        rounded, seen = codes_dy.astype(jnp.float32) * scale_dy, codes_x.astype(jnp.float32) * scale_x
        dweight = by_group_of_weights(seen, weight, sizes_E, rounded, x.dtype)
        return by_group_of_inputs(x, weight, sizes_E, rounded), dweight
    dx = _product(codes_dy, jnp.asarray(weight.codes), (dy.ndim - 1,), (0,)) * (scale_dy * weight.scale[0, 0])
    tokens = tuple(range(dy.ndim - 1))
    return dx.astype(x.dtype), _product(codes_dy, codes_x, tokens, tokens) * (scale_dy * scale_x)


def _own(x: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
    """x, with zeros in rows that are of no group."""
    if sizes_E is None:
        return x
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes_E))[:, None], x, 0)


def _scale(x: jax.Array, largest: float) -> jax.Array:
    """amax / largest, float32; 1 where that is below 2^-126."""
    scale = low.exact_divide(jnp.max(jnp.abs(x)).astype(jnp.float32), largest)
    return jnp.where(scale < low.LEAST, 1.0, scale)


def _product(left: jax.Array, right: jax.Array, left_axes: tuple[int, ...], right_axes: tuple[int, ...]) -> jax.Array:
    """Codes times codes over these axes, float32; XLA's CPU backend has no products of eight-bit floats."""
    if platform() == 'cpu':
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jax.lax.dot_general(left, right, ((left_axes, right_axes), ((), ())), preferred_element_type=jnp.float32)
