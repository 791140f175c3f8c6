"""The product of every linear layer: `dot(x, kernel)`, where the type of the kernel decides how it is computed.

A kernel is an array [out, in], or a weight type of this package: a registered dataclass pytree with a logical
`shape`, `ndim` and `dtype`. Stacked on a leading repeats axis it passes through `jax.lax.scan`, which hands `dot` one
layer of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jpt.kernels.grouped_matmul import grouped_matmul
from jpt.kernels.local_products import Pieces
from jpt.quant.alike import Alike
from jpt.quant.producers import Deferred, dense_of
from jpt.quant.products import quantized, quantized_dot, quantized_grouped_dot
from jpt.quant.tensors import FakeQuant, QTensor, dequantize
from jpt.quant.tried import Tried, tried_dot

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraKernel(Alike):
    """A weight and a low-rank addition to it: base + scale * b a (Hu et al. 2021, arXiv:2106.09685, equation 3).

    `base` [out, in] is itself any weight, `a` [rank, in], `b` [out, rank]; all may carry the same leading repeats axis.
    """

    base: Weight
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={'static': True})

    @property
    def _like(self) -> Any:
        return self.base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A weight [out, in] that lies in memory as [in, out]: on CPU a few rows are multiplied by it in half the time."""

    held: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.held.shape[:-2], self.held.shape[-1], self.held.shape[-2])

    @property
    def ndim(self) -> int:
        return self.held.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.held.dtype


Weight = Array | LoraKernel | Transposed | QTensor | FakeQuant | Tried
Precision = Literal['highest'] | None
KINDS = 'an array, LoraKernel, Transposed, QTensor, FakeQuant, Tried'


def is_weight(leaf: Any) -> bool:
    """Whether a node of a parameter tree is a weight type, to be taken whole in tree maps (`is_leaf`)."""
    return isinstance(leaf, LoraKernel | Transposed | QTensor | FakeQuant | Tried)


def dot(
    x: jax.Array | Deferred, kernel: Weight, precision: Precision = None, pieces: Pieces | None = None
) -> jax.Array:
    """Multiplies x[..., in] by a kernel [out, in] and returns [..., out] in the dtype of x.

    Arrays are cast to the dtype of x first: this is where float32 master weights meet a bfloat16 computation.
    `precision` is that of `jax.lax.dot_general`, for this product and those of its gradients. `pieces` says what a
    mesh divides of the kernel, for those of our own that multiply shards; without it, and arrays, XLA divides.
    """
    match kernel:
        case LoraKernel(base, a, b, scale):
            inner = _dot_array(dense_of(x), a, precision=precision)
            return dot(x, base, precision, pieces) + scale * _dot_array(inner, b, precision=precision)
        case Transposed(held):
            return _dot_array(dense_of(x), held, 0, precision)
        case QTensor() | FakeQuant():
            return quantized_dot(x, kernel, pieces)
        case Tried():
            return tried_dot(dense_of(x), kernel)
        case jax.Array() | np.ndarray():
            return _dot_array(dense_of(x), kernel, precision=precision)
        case _:
            raise TypeError(f'kernel of type {type(kernel).__name__}: expected one of {KINDS}')


def grouped_dot(x_MI: jax.Array | Deferred, kernels: Weight, sizes_E: jax.Array) -> jax.Array:
    """Multiplies rows [M, in], sorted by group, each by its group's kernel of [E, out, in]: [M, out] in the dtype of x.

    Group e has the next sizes_E[e] rows; rows beyond all groups give 0. Products are made in the dtype of x.

    Raises:
        TypeError: a weight type that has no grouped product.
    """
    match kernels:
        case QTensor() | FakeQuant():
            return quantized_grouped_dot(x_MI, kernels, sizes_E)
        case Tried():
            return tried_dot(dense_of(x_MI), kernels, sizes_E)
        case jax.Array() | np.ndarray():
            return grouped_matmul(dense_of(x_MI), kernels, sizes_E)
        case _:
            raise TypeError(
                f"experts' kernels of type {type(kernels).__name__}: expected an array, QTensor, FakeQuant or Tried"
            )


def dense(kernel: Weight) -> jax.Array:
    """The array [..., out, in] that a weight stands for, in its own dtype; products are taken in at least float32."""
    match kernel:
        case LoraKernel(base, a, b, scale):
            wide = jnp.promote_types(kernel.dtype, jnp.float32)
            delta = jnp.matmul(b.astype(wide), a.astype(wide), precision='highest')
            return (dense(base).astype(wide) + scale * delta).astype(kernel.dtype)
        case Transposed(held):
            return jnp.swapaxes(held, -1, -2)
        case FakeQuant():
            return dense(quantized(kernel))
        case QTensor(input_factor=factor):
            weight = dequantize(kernel)
            return weight if factor is None else (weight * factor[..., None, :]).astype(weight.dtype)
        case jax.Array() | np.ndarray():
            return jnp.asarray(kernel)
        case _:
            raise TypeError(f'kernel of type {type(kernel).__name__}: expected one of {KINDS}')


def _dot_array(x: jax.Array, kernel: Array, axis: int = 1, precision: Precision = None) -> jax.Array:
    """x[..., in] times a matrix whose `axis` is `in`."""
    return _product(x, kernel.astype(x.dtype), axis, precision)


def _plain_product(x: jax.Array, matrix: jax.Array, axis: int, precision: Precision) -> jax.Array:
    contract = ((x.ndim - 1,), (axis,)), ((), ())
    return jax.lax.dot_general(x, matrix, contract, precision, preferred_element_type=x.dtype)


_product = jax.custom_vjp(_plain_product, nondiff_argnums=(2, 3))


def _product_fwd(
    x: jax.Array, matrix: jax.Array, axis: int, precision: Precision
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not _product: remat='dots' would not see that its result is that of a product.
    return _plain_product(x, matrix, axis, precision), (x, matrix)


def _product_bwd(
    axis: int, precision: Precision, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two gradients, the matrix's with the narrower operand on the left.

    On CPU a product over the rows of both operands begins with a transposed copy of the left one, together with all
    elementwise work that makes it: for an MLP's gate that is the wide one, and its copy took a sixth of a step.
    """
    x, matrix = residuals
    dx = _plain_product(dy, matrix, 1 - axis, precision)
    rows = tuple(range(x.ndim - 1))
    wide = dy.shape[-1] > x.shape[-1]
    left, right = (x, dy) if wide else (dy, x)
    dmatrix = jax.lax.dot_general(left, right, ((rows, rows), ((), ())), precision, preferred_element_type=x.dtype)
    in_first = axis == 0
    return dx, dmatrix if wide == in_first else dmatrix.T


_product.defvjp(_product_fwd, _product_bwd)
