"""Products with quantized weights: what becomes of the inputs, the product itself, and what gradients see of both.

Backward, rounding is the identity (straight through, Bengio et al. 2013, arXiv:1308.3432): a product is differentiated
as the product of the numbers that it multiplied. A QTensor gets no gradient, the weight of a FakeQuant does. In FP8
training what gradients are made of is rounded once more, see gradients.py.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from jpt.kernels import low_precision as low
from jpt.kernels.block_quantize import SCALES, rounded_to
from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.grouped_matmul import PRODUCT, grouped_matmul
from jpt.kernels.local import mesh_axes, platform
from jpt.kernels.local_products import (
    Lies,
    Pieces,
    block_product,
    cut,
    grouped_block_product,
    lies,
    weight_only_product,
    whole,
)
from jpt.kernels.te import tensor_dot
from jpt.kernels.weight_only_matmul import INPUTS, MOST_ROWS
from jpt.quant.current_scaling import tensor_gradients, with_current_scale
from jpt.quant.formats import Format
from jpt.quant.gradients import block_gradients
from jpt.quant.producers import Deferred, Given, dense_of
from jpt.quant.tensors import BEYOND, FakeQuant, Gradients, QTensor, codes_of, dequantize, numbers_of, quantize, within

# How gradients are multiplied, by FakeQuant.gradients, where not as autodiff has it.
IN_EIGHT_BITS = {'block': block_gradients, 'tensor': tensor_gradients}


def quantized_dot(x: jax.Array | Deferred, kernel: QTensor | FakeQuant, pieces: Pieces | None = None) -> jax.Array:
    """x [..., in] times a kernel [out, in]: [..., out] in the dtype of x. `pieces`: as `dot.dot` takes them."""
    if isinstance(kernel, FakeQuant) and kernel.gradients == 'te':
        if kernel.input_scale is not None or kernel.input_factor is not None:
            raise ValueError("gradients='te' with an input_scale or input_factor: expected None of both")
        return tensor_dot(dense_of(x), kernel.weight)
    return _multiplied(x, kernel, None, lies(x.shape, pieces))


def quantized_grouped_dot(x_MI: jax.Array | Deferred, kernels: QTensor | FakeQuant, sizes_E: jax.Array) -> jax.Array:
    """Rows [M, in], sorted by group, each times its group's kernel of [E, out, in]; see `dot.grouped_dot`.

    Raises:
        ValueError: kernels whose products are to be Transformer Engine's.
    """
    if isinstance(kernels, FakeQuant) and kernels.gradients == 'te':
        raise ValueError("experts with gradients='te': expected 'tensor', or a recipe that leaves experts out")
    return _multiplied(x_MI, kernels, sizes_E, whole(x_MI.ndim))  # its caller has divided what divides


def _multiplied(
    x: jax.Array | Deferred, kernel: QTensor | FakeQuant, sizes_E: jax.Array | None, where: Lies | None
) -> jax.Array:
    product = _product if isinstance(kernel, QTensor) else _fake_product
    return product(dense_of(x), kernel, sizes_E, _shared_inputs(x, kernel, where), where)


def _shared_inputs(x: jax.Array | Deferred, kernel: QTensor | FakeQuant, where: Lies | None) -> QTensor | None:
    """What all weights make alike of an input that several of them may read, made once; None: a weight rounds its own.

    A weight with a scale or factors for its inputs has its own. The array is still what gradients go through.
    """
    form, own = kernel.format, inputs_format(kernel.format)
    alike = form.inputs in ('block', 'token') and kernel.input_scale is None and kernel.input_factor is None
    if not isinstance(x, Deferred) or not alike:
        return None

    def made() -> QTensor | None:
        if _by_kernel(own, x, where):
            return _of_rows(own, *x.codes(own.scale, where or whole(x.ndim)))
        return round_inputs(jax.lax.stop_gradient(x.dense()), form, where=where)

    return x.once((form.inputs, own, where and where.inputs), made)


def round_inputs(
    x: jax.Array, form: Format, input_scale: jax.Array | None = None, where: Lies | None = None
) -> QTensor | None:
    """What a layer whose weight has this format makes of its inputs [..., in]; None: it takes them as they are.

    Every token is rounded as a weight [1, in] of its own, so the result [..., 1, in] does not depend on the tokens
    beside it. `input_scale` [...] is broadcast to the tokens: the scale of 'tensor', and the second one of E2M1, which
    else is that of the token. `where`: how x lies on a mesh, for the kernel; without it XLA rounds there, to the same
    bits.

    Raises:
        ValueError: 'tensor' without its scale.
    """
    if form.inputs == 'as_they_are':
        return None
    own = inputs_format(form)
    if _by_kernel(own, x, where):
        return _of_rows(own, *Given(x).codes(own.scale, where or whole(x.ndim)))
    wide = rounded_to(x.dtype, x.astype(jnp.float32))[..., None, :]
    scale = None if input_scale is None else jnp.broadcast_to(input_scale, x.shape[:-1])[..., None, None]
    if form.inputs != 'tensor':
        return quantize(wide, own, scale_2=scale if own.scale == 'e4m3' else None)
    if scale is None:
        raise ValueError("a weight with inputs='tensor' has no input_scale: calibrate it (python -m jpt.quantize)")
    return QTensor(codes_of(low.exact_divide(wide, scale), own), scale, format=own, weight_dtype='float32')


def inputs_format(form: Format) -> Format:
    """The format of a token [1, in] at the input of a weight of this format."""
    columns = form.input_block if form.inputs == 'block' else 0
    scale = form.scale if form.inputs == 'block' or form.scale == 'power_of_two' else 'float32'
    return Format(form.operand, 1, columns, scale)


def _forward(
    x: jax.Array, weight: QTensor, sizes_E: jax.Array | None, rounded: QTensor | None, where: Lies | None
) -> jax.Array:
    """The product, in the dtype of x. `rounded`: what x becomes, where it is there already."""
    x = _times_factor(x, weight.input_factor, sizes_E)
    if rounded is None:
        rounded = round_inputs(x, weight.format, _per_row(weight.input_scale, sizes_E, x), where)
    where = where if _has_kernels(weight, where) else None
    if rounded is None and sizes_E is None and where and _few(x, where):
        few = weight_only_product(x, jnp.asarray(weight.codes), jnp.asarray(weight.scale), where)
        return checkpoint_name(few, PRODUCT)
    if rounded is None:
        return plain_product(x, dequantize(weight).astype(x.dtype), sizes_E)
    if where:
        return _by_kernels(x, rounded, weight, sizes_E, where)
    if sizes_E is not None or weight.format.columns or weight.format.packed or weight.format.input_columns:
        return plain_product(_dense(rounded), numbers_of(weight), sizes_E).astype(x.dtype)
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


def _by_kernel(own: Format, x: jax.Array | Deferred, where: Lies | None) -> bool:
    """Whether inputs in this format are rounded by the kernel (kernels/block_quantize.py), on a mesh shard by shard."""
    rows_of_128 = (own.element, own.rows, own.columns) == ('e4m3', 1, BLOCK) and own.scale in SCALES
    if where is None:
        return rows_of_128 and not mesh_axes(AxisType.Auto)
    return rows_of_128 and cut(where._replace(out=()), 0, x.shape[-1]) is None


def _of_rows(own: Format, codes: jax.Array, scales: jax.Array) -> QTensor:
    return QTensor(codes[..., None, :], scales[..., None, :], format=own, weight_dtype='float32')


def _has_kernels(weight: QTensor, where: Lies | None) -> bool:
    """Whether this weight has products of its own (kernels/local_products.py), on a mesh shard by shard."""
    if where is None:
        return False
    form = weight.format
    blocks = (form.element, form.rows, form.columns, form.input_block) == ('e4m3', BLOCK, BLOCK, BLOCK)
    blocks = blocks and form.scale in SCALES
    return blocks and form.inputs in ('block', 'as_they_are') and cut(where, *weight.shape[-2:]) is None


def _few(x: jax.Array, where: Lies) -> bool:
    """Whether a device has the few rows of a decoding step, in a dtype that the kernel for them takes."""
    return where.rows(x.shape) <= MOST_ROWS and x.dtype.name in INPUTS


def _by_kernels(x: jax.Array, rounded: QTensor, weight: QTensor, sizes_E: jax.Array | None, where: Lies) -> jax.Array:
    """The product of blocks of 128 x 128 with inputs in blocks of 128, promoted to float32 block by block."""
    codes, scale = (jnp.asarray(part)[..., 0, :] for part in (rounded.codes, rounded.scale))
    dtype = x.dtype if x.dtype in (jnp.bfloat16, jnp.float16) else jnp.float32
    operands = codes, scale, jnp.asarray(weight.codes), jnp.asarray(weight.scale)
    if sizes_E is None:
        product = block_product(*operands, dtype, where)
    else:
        product = grouped_block_product(*operands, sizes_E, dtype)
    # Remat policies look for products, and find none in a kernel.
    return checkpoint_name(product.astype(x.dtype), PRODUCT)


def _operand(codes: jax.Array) -> jax.Array:
    """Codes as the platform multiplies them: XLA's CPU backend has no product of eight-bit floats of its own."""
    return codes.astype(jnp.float32) if codes.dtype == low.E4M3 and platform() == 'cpu' else codes


def plain_product(x: jax.Array, weight: jax.Array, sizes_E: jax.Array | None) -> jax.Array:
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


def _backward(
    x: jax.Array,
    weight: QTensor,
    sizes_E: jax.Array | None,
    where: Lies | None,
    dy: jax.Array,
    gradients: Gradients = 'as_they_are',
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and of the weight before it was rounded."""
    scaled = _times_factor(x, weight.input_factor, sizes_E)
    if gradients != 'as_they_are':
        dx, dweight = IN_EIGHT_BITS[gradients](scaled, weight, sizes_E, where, dy)
    else:
        rounded = round_inputs(scaled, weight.format, _per_row(weight.input_scale, sizes_E, x), where)
        seen = scaled if rounded is None else _dense(rounded).astype(x.dtype)
        _, pull = jax.vjp(lambda x, w: plain_product(x, w, sizes_E), seen, dequantize(weight).astype(x.dtype))
        dx, dweight = pull(dy)
    if weight.input_factor is not None:
        dx = _times_factor(dx, weight.input_factor, sizes_E)
        dweight = dweight / weight.input_factor[..., None, :].astype(dweight.dtype)
    return dx, dweight


_product = jax.custom_vjp(_forward, nondiff_argnums=(4,))


def _product_fwd(
    x: jax.Array, weight: QTensor, sizes_E: jax.Array | None, rounded: QTensor | None, where: Lies | None
) -> tuple[jax.Array, Any]:
    return _forward(x, weight, sizes_E, rounded, where), (x, weight, sizes_E)


def _product_bwd(where: Lies | None, residuals: Any, dy: jax.Array) -> tuple[jax.Array, None, None, None]:
    x, weight, sizes_E = residuals
    return _backward(x, weight, sizes_E, where, dy)[0], None, None, None


_product.defvjp(_product_fwd, _product_bwd)


def quantized(kernel: FakeQuant) -> QTensor:
    """The weight that a fake one computes as."""
    if kernel.rounded is not None:
        return dataclasses.replace(kernel.rounded, input_scale=kernel.input_scale)
    beside = {name: getattr(kernel, name) for name in ('input_scale', 'input_factor', 'scale_2')}
    return quantize(kernel.weight, kernel.format, **beside)


def _quantized_for(x: jax.Array, kernel: FakeQuant, sizes_E: jax.Array | None) -> QTensor:
    """The same with the scale of these inputs where that is found at every step.

    Raises:
        ValueError: a scale from calibration beside it.
    """
    weight = quantized(kernel)
    if kernel.gradients != 'tensor':
        return weight
    if kernel.input_scale is not None:
        raise ValueError("gradients='tensor' with an input_scale: expected None, it is found at every step")
    return with_current_scale(weight, _times_factor(x, weight.input_factor, sizes_E), sizes_E)


def _beyond(x: jax.Array, weight: QTensor, sizes_E: jax.Array | None) -> jax.Array:
    """Which inputs are larger than the largest number with the weight's static scale of inputs."""
    own = inputs_format(weight.format)
    largest = own.largest * (low.E4M3_MAX if own.scale == 'e4m3' else 1.0)
    limit = largest * BEYOND * jnp.broadcast_to(_per_row(weight.input_scale, sizes_E, x), x.shape[:-1])
    return jnp.abs(x.astype(jnp.float32)) > limit[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fake_product(
    x: jax.Array, kernel: FakeQuant, sizes_E: jax.Array | None, rounded: QTensor | None, where: Lies | None
) -> jax.Array:
    return _forward(x, _quantized_for(x, kernel, sizes_E), sizes_E, rounded, where)


def _fake_product_fwd(
    x: jax.Array, kernel: FakeQuant, sizes_E: jax.Array | None, rounded: QTensor | None, where: Lies | None
) -> tuple[jax.Array, Any]:
    # Not `_fake_product` itself: remat policies would not see the product. And backward the weight is rounded again:
    # else its codes and scales would be held for every layer, undivided.
    return _forward(x, _quantized_for(x, kernel, sizes_E), sizes_E, rounded, where), (x, kernel, sizes_E)


def _fake_product_bwd(where: Lies | None, residuals: Any, dy: jax.Array) -> tuple[jax.Array, FakeQuant, None, None]:
    x, kernel, sizes_E = residuals
    weight = _quantized_for(x, kernel, sizes_E)
    dx, dweight = _backward(x, weight, sizes_E, where, dy, kernel.gradients)
    if kernel.clipped and weight.input_scale is not None:
        dx = jnp.where(_beyond(_times_factor(x, weight.input_factor, sizes_E), weight, sizes_E), 0, dx)
    zeros = {
        name: None if value is None else jnp.zeros_like(value)
        for name, value in ((name, getattr(kernel, name)) for name in ('input_scale', 'input_factor', 'scale_2'))
    }
    dweight = within(kernel, dweight.astype(kernel.weight.dtype))
    own = dataclasses.replace(kernel, weight=dweight, rounded=None, **zeros)
    return dx, own, None, None


_fake_product.defvjp(_fake_product_fwd, _fake_product_bwd)
