"""Products with quantized weights: what becomes of the inputs, the product itself, and what gradients see of both.

Backward, rounding is the identity (straight through, Bengio et al. 2013, arXiv:1308.3432): a product is differentiated
as the product of the numbers that it multiplied. A QTensor gets no gradient, the weight of a FakeQuant does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jpt.kernels import low_precision as low
from jpt.kernels.block_matmul import BLOCK, block_matmul
from jpt.kernels.block_quantize import SCALES, quantize_rows
from jpt.kernels.grouped_block_matmul import grouped_block_matmul
from jpt.kernels.grouped_matmul import grouped_matmul
from jpt.kernels.local import mesh_axes, platform
from jpt.kernels.weight_only_matmul import INPUTS, MOST_ROWS, weight_only_matmul
from jpt.quant.formats import Format
from jpt.quant.tensors import FakeQuant, QTensor, codes_of, dequantize, numbers_of, quantize


def quantized_dot(x: jax.Array, kernel: QTensor | FakeQuant) -> jax.Array:
    """x [..., in] times a kernel [out, in]: [..., out] in the dtype of x."""
    return _product(x, kernel, None) if isinstance(kernel, QTensor) else _fake_product(x, kernel, None)


def quantized_grouped_dot(x_MI: jax.Array, kernels: QTensor | FakeQuant, sizes_E: jax.Array) -> jax.Array:
    """Rows [M, in], sorted by group, each times its group's kernel of [E, out, in]; see `dot.grouped_dot`."""
    return _product(x_MI, kernels, sizes_E) if isinstance(kernels, QTensor) else _fake_product(x_MI, kernels, sizes_E)


def round_inputs(x: jax.Array, form: Format, input_scale: jax.Array | None = None) -> QTensor | None:
    """What a layer whose weight has this format makes of its inputs [..., in]; None: it takes them as they are.

    Every token is rounded as a weight [1, in] of its own, so the result [..., 1, in] does not depend on the tokens
    beside it. `input_scale` [...] is broadcast to the tokens: the scale of 'tensor', and the second one of E2M1, which
    else is that of the token.

    Raises:
        ValueError: 'tensor' without its scale.
    """
    if form.inputs == 'as_they_are':
        return None
    wide = x.astype(jnp.float32)[..., None, :]
    scale = None if input_scale is None else jnp.broadcast_to(input_scale, x.shape[:-1])[..., None, None]
    own = inputs_format(form)
    if _in_rows_of_128(own) and not mesh_axes(AxisType.Auto):
        codes, scales = quantize_rows(x, own.columns, own.scale)  # the same bits, on GPUs in one pass
        return QTensor(codes[..., None, :], scales[..., None, :], format=own, weight_dtype='float32')
    if form.inputs != 'tensor':
        return quantize(wide, own, scale_2=scale if own.scale == 'e4m3' else None)
    if scale is None:
        raise ValueError("a weight with inputs='tensor' has no input_scale: calibrate it (python -m jpt.quantize)")
    return QTensor(codes_of(low.exact_divide(wide, scale), own), scale, format=own, weight_dtype='float32')


def inputs_format(form: Format) -> Format:
    """The format of a token [1, in] at the input of a weight of this format."""
    columns = form.columns if form.inputs == 'block' else 0
    scale = form.scale if form.inputs == 'block' or form.scale == 'power_of_two' else 'float32'
    return Format(form.operand, 1, columns, scale)


def _forward(x: jax.Array, weight: QTensor, sizes_E: jax.Array | None) -> jax.Array:
    """The product, in the dtype of x."""
    x = _times_factor(x, weight.input_factor, sizes_E)
    rounded = round_inputs(x, weight.format, _per_row(weight.input_scale, sizes_E, x))
    if rounded is None and sizes_E is None and _has_kernels(weight.format) and _few(x):
        product = weight_only_matmul(
            x.reshape(-1, x.shape[-1]), jnp.asarray(weight.codes), jnp.asarray(weight.scale), x.dtype
        )
        return product.reshape(*x.shape[:-1], -1)
    if rounded is None:
        return _plain(x, dequantize(weight).astype(x.dtype), sizes_E)
    if _has_kernels(weight.format):
        return _by_kernels(x, rounded, weight, sizes_E)
    if sizes_E is not None or weight.format.columns or weight.format.packed:
        return _plain(_dense(rounded), numbers_of(weight), sizes_E).astype(x.dtype)
    # One scale for all of `in` on both sides: codes are multiplied as they are, which tensor cores do.
    exact = jnp.int32 if weight.format.element == 'int8' else jnp.float32
    contract = ((rounded.ndim - 2,), (1,)), ((), ())
    product = jax.lax.dot_general(
        _operand(jnp.asarray(rounded.codes)[..., 0, :]),
        _operand(jnp.asarray(weight.codes)),
        contract,
        preferred_element_type=exact,
    )
    scale_out = jnp.broadcast_to(weight.scale[:, 0], weight.shape[:1])
    scaled = product.astype(jnp.float32) * rounded.scale[..., 0] * _like(scale_out, product)
    return scaled.astype(x.dtype)


def _in_rows_of_128(form: Format) -> bool:
    return (form.element, form.rows, form.columns) == ('e4m3', 1, BLOCK) and form.scale in SCALES


def _has_kernels(form: Format) -> bool:
    """Whether a weight of this format has products of its own (kernels/block_matmul.py), which know no mesh."""
    blocks = (form.element, form.rows, form.columns) == ('e4m3', BLOCK, BLOCK) and form.scale in SCALES
    return blocks and form.inputs in ('block', 'as_they_are') and not mesh_axes(AxisType.Auto)


def _few(x: jax.Array) -> bool:
    """Whether these are the few rows of a decoding step, in a dtype that the kernel for them takes."""
    return math.prod(x.shape[:-1]) <= MOST_ROWS and x.dtype.name in INPUTS


def _by_kernels(x: jax.Array, rounded: QTensor, weight: QTensor, sizes_E: jax.Array | None) -> jax.Array:
    """The product of blocks of 128 x 128 with inputs in blocks of 128, promoted to float32 block by block."""
    codes, scale = (jnp.asarray(part).reshape(-1, part.shape[-1]) for part in (rounded.codes, rounded.scale))
    dtype = x.dtype if x.dtype in (jnp.bfloat16, jnp.float16) else jnp.float32
    operands = codes, scale, jnp.asarray(weight.codes), jnp.asarray(weight.scale)
    if sizes_E is None:
        product = block_matmul(*operands, dtype)
    else:
        product = grouped_block_matmul(*operands, sizes_E, dtype)
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _operand(codes: jax.Array) -> jax.Array:
    """Codes as the platform multiplies them: XLA's CPU backend has no product of eight-bit floats of its own."""
    return codes.astype(jnp.float32) if codes.dtype == low.E4M3 and platform() == 'cpu' else codes


def _plain(x: jax.Array, weight: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
    """The product of arrays of one dtype, in that dtype."""
    if sizes_E is not None:
        return grouped_matmul(x, weight, sizes_E)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)


def _dense(rounded: QTensor) -> jax.Array:
    """Rounded inputs [..., in], float32."""
    return numbers_of(rounded)[..., 0, :]


def _times_factor(x: jax.Array, factor: Any, sizes_E: jax.Array | None) -> jax.Array:
    return x if factor is None else x * _like(_per_row(factor, sizes_E, x), x).astype(x.dtype)


def _like(values: Any, x: jax.Array) -> jax.Array:
    """The values [..., n] with as many axes as x has."""
    return jnp.asarray(values).reshape((1,) * (x.ndim - values.ndim) + values.shape)


def _per_row(values: Any, sizes_E: jax.Array | None, x: jax.Array) -> Any:
    """Values [E, ...] of every group as those of each row's group, or the values where there are no groups."""
    if values is None or sizes_E is None:
        return values
    ends = jnp.cumsum(sizes_E)
    group = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side='right')
    return jnp.take(values, group, axis=0, mode='clip')


def _backward(x: jax.Array, weight: QTensor, sizes_E: jax.Array | None, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and of the weight before it was rounded."""
    scaled = _times_factor(x, weight.input_factor, sizes_E)
    rounded = round_inputs(scaled, weight.format, _per_row(weight.input_scale, sizes_E, x))
    seen = scaled if rounded is None else _dense(rounded).astype(x.dtype)
    _, pull = jax.vjp(lambda x, w: _plain(x, w, sizes_E), seen, dequantize(weight).astype(x.dtype))
    dx, dweight = pull(dy)
    if weight.input_factor is not None:
        dx = _times_factor(dx, weight.input_factor, sizes_E)
        dweight = dweight / weight.input_factor[..., None, :].astype(dweight.dtype)
    return dx, dweight


_product = jax.custom_vjp(_forward)


def _product_fwd(x: jax.Array, weight: QTensor, sizes_E: jax.Array | None) -> tuple[jax.Array, Any]:
    return _forward(x, weight, sizes_E), (x, weight, sizes_E)


def _product_bwd(residuals: Any, dy: jax.Array) -> tuple[jax.Array, None, None]:
    x, weight, sizes_E = residuals
    return _backward(x, weight, sizes_E, dy)[0], None, None


_product.defvjp(_product_fwd, _product_bwd)


def quantized(kernel: FakeQuant) -> QTensor:
    """The weight that a fake one computes as."""
    return quantize(kernel.weight, kernel.format, input_scale=kernel.input_scale, input_factor=kernel.input_factor)


@jax.custom_vjp
def _fake_product(x: jax.Array, kernel: FakeQuant, sizes_E: jax.Array | None) -> jax.Array:
    return _forward(x, quantized(kernel), sizes_E)


def _fake_product_fwd(x: jax.Array, kernel: FakeQuant, sizes_E: jax.Array | None) -> tuple[jax.Array, Any]:
    weight = quantized(kernel)
    return _forward(x, weight, sizes_E), (x, kernel, weight, sizes_E)


def _fake_product_bwd(residuals: Any, dy: jax.Array) -> tuple[jax.Array, FakeQuant, None]:
    x, kernel, weight, sizes_E = residuals
    dx, dweight = _backward(x, weight, sizes_E, dy)
    zeros = {
        name: None if value is None else jnp.zeros_like(value)
        for name, value in (('input_scale', kernel.input_scale), ('input_factor', kernel.input_factor))
    }
    return dx, dataclasses.replace(kernel, weight=dweight.astype(kernel.weight.dtype), **zeros), None


_fake_product.defvjp(_fake_product_fwd, _fake_product_bwd)
