"""Quantized weights: packed as checkpoints hold them, or rounded on the way while the weight itself is trained.

Both are registered dataclass pytrees of plain arrays with the logical `shape`, `ndim` and `dtype` of the weight that
they stand for, stacked or not. What `quantize` writes is what formulas of one IEEE division each give, bit by bit, on
every mesh and backend; see docs/quantize.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jpt.kernels import low_precision as low
from jpt.kernels.te import NO_BLOCKS
from jpt.quant.alike import Alike
from jpt.quant.formats import Format

Array = jax.Array | np.ndarray
Gradients = Literal['as_they_are', 'block', 'tensor', 'te']
PARTS = ('codes', 'scale', 'scale_2', 'input_scale', 'input_factor')
STATIC = ('input_scale', 'scale_2')  # what calibration may find for a weight that is trained
CODES: dict[str, Any] = {'e4m3': low.E4M3, 'e2m1': jnp.uint8, 'int8': jnp.int8, 'int4': jnp.uint8}
SCALES: dict[str, Any] = {
    'float32': jnp.float32,
    'power_of_two': jnp.float32,
    'e8m0': jnp.uint8,
    'e4m3': low.E4M3,
    'e4m3_grid': jnp.float32,
}
# A scale of 2^-9, the least positive E4M3 number, still tells the codes of its block.
_LEAST_E4M3 = 2.0**-9
_E8M0_ONE = 127
# What is beyond the largest number of a scale that was rounded down from it is not beyond.
BEYOND = 1 + 2.0**-20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight [..., out, in] as codes and scales.

    codes: [..., out, in] in the element's dtype, or [..., out, in / 2] uint8 where two share a byte.
    scale: one per block, [..., out / rows, in / columns]; of 'e8m0' the exponents' bytes.
    scale_2: [..., 1, 1] float32, where `scale` is relative to it, or code * scale is rounded to E4M3 times it.
    input_scale: [...] float32, what inputs are divided by before they are rounded; None where that is dynamic.
    input_factor: [..., in] float32, what inputs are multiplied by first; the weight was divided by it (SmoothQuant,
        AWQ).
    weight_dtype: the dtype of the weight that was quantized, and of what stands for it.
    """

    codes: Array
    scale: Array
    scale_2: Array | None = None
    input_scale: Array | None = None
    input_factor: Array | None = None
    format: Format = dataclasses.field(metadata={'static': True}, kw_only=True)
    weight_dtype: str = dataclasses.field(metadata={'static': True}, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, inner = self.codes.shape
        return (*lead, 2 * inner if self.format.packed else inner)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.weight_dtype)

    def part_specs(self, spec: P, sizes: Mapping[str, int]) -> QTensor:
        """How the arrays lie where the weight lies by `spec`, which has an entry per axis, on a mesh of these sizes.

        Scales lie as their weight where every shard holds whole blocks; else every device along that axis has them all.

        Raises:
            ValueError: a byte that holds two elements would be cut.
        """
        *lead, out, inner = spec
        blocks = (self.format.rows or self.shape[-2], self.format.columns or self.shape[-1])
        whole = [
            axes if self.shape[at] % (_ways(axes, sizes) * block) == 0 else None
            for at, axes, block in ((-2, out, blocks[0]), (-1, inner, blocks[1]))
        ]
        if self.codes.shape[-1] % _ways(inner, sizes):
            raise ValueError(
                f'a weight {self.shape} of which two elements share a byte does not divide over '
                f'{_ways(inner, sizes)} shards: expected inputs in a multiple of {2 * _ways(inner, sizes)}'
            )
        parts: dict[str, Any] = {
            'codes': P(*lead, out, inner),
            'scale': P(*lead, *whole),
            'scale_2': None if self.scale_2 is None else P(*lead, None, None),
            'input_scale': None if self.input_scale is None else P(*lead),
            'input_factor': None if self.input_factor is None else P(*lead, inner),
        }
        return dataclasses.replace(self, **parts)

    def local_specs(self, spec: P, sizes: Mapping[str, int], name: str) -> QTensor:
        """The same for a product on shards alone: each must hold whole blocks, and all that a scale of inputs is of.

        Raises:
            ValueError: a shard would hold a part of a block, or a token's inputs in part that are scaled together.
        """
        _check_whole(self.format, self.shape, spec, sizes, name, self.input_scale is None)
        return self.part_specs(spec, sizes)


def _check_whole(
    form: Format, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int], name: str, dynamic: bool
) -> None:
    """Raises ValueError where a shard would hold a part of a block, or a part of what is scaled together."""
    for at, block in ((-2, form.rows), (-1, form.columns)):
        ways = _ways(spec[at], sizes)
        if ways > 1 and block and shape[at] % (ways * block):
            raise ValueError(
                f'{name} {shape}: blocks of {block} do not divide over {ways} shards of its axis {at}: '
                f'expected {shape[at]} to be a multiple of {ways * block}'
            )
    ways = _ways(spec[-1], sizes)
    if ways > 1 and form.inputs == 'block' and shape[-1] % (ways * form.input_block):
        raise ValueError(
            f'{name} {shape}: blocks of {form.input_block} inputs do not divide over {ways} shards: expected '
            f'{shape[-1]} to be a multiple of {ways * form.input_block}'
        )
    together = form.inputs == 'token' or (form.inputs == 'block' and form.scale == 'e4m3')
    if together and dynamic and ways > 1:
        raise ValueError(
            f'{name} {shape}: its inputs lie on {ways} shards and have one scale per token: '
            "expected a format with inputs='block', or tensor=1"
        )


def _ways(axes: Any, sizes: Mapping[str, int]) -> int:
    """Into how many pieces an axis is cut by its entry of a PartitionSpec."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(sizes.get(name, 1) for name in names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeQuant(Alike):
    """A weight [..., out, in] in training that computes what its quantized form does: rounded forward, straight through
    backward (Bengio et al. 2013, arXiv:1308.3432). `input_scale`, `input_factor` and `scale_2` as in QTensor; where
    `scale_2` is None it follows from the weight.

    gradients: 'as_they_are'; or what is multiplied for them is rounded to eight bits too, by 'block'
        (jpt/quant/gradients.py) or with one scale per array ('tensor', jpt/quant/current_scaling.py), which inputs then
        have forward, too; or by Transformer Engine ('te', jpt/kernels/te.py).
    clipped: inputs beyond `input_scale` and weights beyond a given `scale_2`, which saturate, pass no gradient.
    rounded: the quantized form, where it is there already: then `weight` has no numbers, and gradients go to it all the
        same.

    Raises:
        ValueError: `gradients` that there is not, or that does not go with the format.
    """

    weight: Array
    input_scale: Array | None = None
    input_factor: Array | None = None
    scale_2: Array | None = None
    rounded: QTensor | None = None
    format: Format = dataclasses.field(metadata={'static': True}, kw_only=True)
    gradients: Gradients = dataclasses.field(default='as_they_are', metadata={'static': True}, kw_only=True)
    clipped: bool = dataclasses.field(default=False, metadata={'static': True}, kw_only=True)

    def __post_init__(self) -> None:
        if refused := refused_gradients(self.gradients, self.format):
            raise ValueError(f'FakeQuant: {refused}')

    @property
    def _like(self) -> Any:
        return self.weight

    def local_specs(self, spec: P, sizes: Mapping[str, int], name: str) -> FakeQuant:
        """How it lies for a product on shards alone; see `QTensor.local_specs`.

        Raises:
            ValueError: likewise; or a scale that is of more than a shard holds.
        """
        _check_whole(self.format, self.shape, spec, sizes, name, self.input_scale is None)
        for at, block in ((-2, self.format.rows), (-1, self.format.columns)):
            apart = not block or (self.format.has_second and self.scale_2 is None)
            if self.rounded is None and apart and _ways(spec[at], sizes) > 1:
                raise ValueError(
                    f'{name} {self.shape}: a scale of all of its axis {at}, which lies on {_ways(spec[at], sizes)} '
                    'shards: expected a format in blocks, or tensor=1'
                )
        lead = spec[:-2]
        parts: dict[str, Any] = {
            'weight': spec,
            'input_scale': None if self.input_scale is None else P(*lead),
            'input_factor': None if self.input_factor is None else P(*lead, spec[-1]),
            'scale_2': None if self.scale_2 is None else P(*lead, None, None),
            'rounded': None if self.rounded is None else self.rounded.part_specs(spec, sizes),
        }
        return dataclasses.replace(self, **parts)


def within(kernel: FakeQuant, gradient: jax.Array) -> jax.Array:
    """A gradient of the weight, 0 where the weight is beyond what its given second scale has room for, if asked."""
    if not kernel.clipped or kernel.scale_2 is None:
        return gradient
    largest = low.E4M3_MAX * (kernel.format.largest if kernel.format.scale == 'e4m3' else 1.0)
    weight = jnp.asarray(kernel.weight)
    if kernel.input_factor is not None:
        weight = weight / jnp.asarray(kernel.input_factor)[..., None, :]
    return jnp.where(jnp.abs(weight) > largest * BEYOND * jnp.asarray(kernel.scale_2), 0, gradient)


def refused_gradients(gradients: Gradients, form: Format) -> str | None:
    """Why a weight of this format cannot have its gradients multiplied this way, or None where it can."""
    if gradients not in get_args(Gradients):
        return f'gradients={gradients!r}: expected one of {", ".join(get_args(Gradients))}'
    square = form.element == 'e4m3' and form.rows == form.columns > 0 and form.scale in ('float32', 'power_of_two')
    if gradients == 'block' and not (square and form.inputs == 'block' and not form.input_columns):
        return f"gradients='block' with {form}: expected fp8_block, fp8_block_ue8m0, or other squares of E4M3"
    whole = form == Format('e4m3', inputs='tensor')
    if gradients in ('tensor', 'te') and not whole:
        why = f' ({NO_BLOCKS})' if gradients == 'te' else ''
        return f'gradients={gradients!r} with {form}: expected fp8_tensor{why}'
    return None


def quantize(
    weight: Array,
    form: Format,
    *,
    amax: Array | None = None,
    input_scale: Array | None = None,
    input_factor: Array | None = None,
    scale_2: Array | None = None,
) -> QTensor:
    """The quantized form of a weight [..., out, in], floating point of 16 or 32 bits.

    scale = amax / largest and code = round(weight / scale), each divided once in float32; a block of zeros has the
    scale 1 (in MX formats the least, 2^-127). Numbers below 2^-126 count as zero, as XLA's CPU backend takes them.

    Args:
        weight: what is quantized.
        form: how.
        amax: [..., out / rows, in / columns] in place of the blocks' largest absolute values; what is beyond saturates.
        input_scale: kept with the weight.
        input_factor: likewise; the weight is divided by it first.
        scale_2: [..., 1, 1] in place of the one that follows from the weight.

    Raises:
        ValueError: a shape that the format does not take.
        TypeError: a weight that is not of floating point, or of 64 bits.
    """
    form.check(weight.shape, 'quantize')
    if not jnp.issubdtype(weight.dtype, jnp.floating) or jnp.dtype(weight.dtype).itemsize not in (2, 4):
        raise TypeError(f'quantize: a weight of {weight.dtype}: expected float32, bfloat16 or float16')
    wide = jnp.asarray(weight).astype(jnp.float32)
    if input_factor is not None:
        wide = low.exact_divide(wide, jnp.asarray(input_factor)[..., None, :])
    largest = block_amax(wide, form) if amax is None else jnp.asarray(amax)
    scale, second = scales_of(largest, form, scale_2)
    codes = codes_with(wide, scale, second, form, lambda per_block: spread(per_block, wide.shape, form))
    name = jnp.dtype(weight.dtype).name
    return QTensor(codes, scale, second, input_scale, input_factor, format=form, weight_dtype=name)


def dequantize(weight: QTensor) -> jax.Array:
    """What codes and scales stand for: [..., out, in] in the dtype of the weight, rounded once from float32.

    Inputs multiplied by `input_factor` belong to it; `dense` has the weight of the inputs as they are.
    """
    return numbers_of(weight).astype(weight.dtype)


def numbers_of(weight: QTensor) -> jax.Array:
    """code * scale of every element, [..., out, in] float32; on the grid of E4M3 where the format has one."""
    scale = number_of(jnp.asarray(weight.scale), weight.scale_2, weight.format)
    numbers = _elements(jnp.asarray(weight.codes), weight.format) * spread(scale, weight.shape, weight.format)
    if weight.format.scale != 'e4m3_grid':
        return numbers
    second = jnp.asarray(weight.scale_2)
    return low.to_e4m3(low.exact_divide(numbers, second)).astype(jnp.float32) * second


def block_amax(weight: jax.Array, form: Format) -> jax.Array:
    """The largest absolute value of every block [..., out / rows, in / columns], in the dtype of the weight.

    NaN where a block holds one. Sizes are compared by their bits, which are in the same order: on CPU a third of the
    time.
    """
    bits = jax.lax.bitcast_convert_type(weight, f'uint{8 * weight.dtype.itemsize}')
    bits = bits & jnp.array(jnp.iinfo(bits.dtype).max >> 1, bits.dtype)  # all but the sign
    amax = jax.lax.bitcast_convert_type(jnp.max(in_blocks(bits, form), axis=(-3, -1)), weight.dtype)
    return jnp.where(amax < low.LEAST, 0, amax)


def in_blocks(weight: jax.Array, form: Format) -> jax.Array:
    """The elements by block, [..., out / rows, rows, in / columns, columns]; zeros beyond the edges."""
    *lead, out, inner = weight.shape
    rows, columns = form.rows or out, form.columns or inner
    blocks = _whole_blocks(weight, rows, columns)
    return blocks.reshape(*lead, blocks.shape[-2] // rows, rows, blocks.shape[-1] // columns, columns)


def scales_of(amax: jax.Array, form: Format, scale_2: Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """The scales of blocks [..., n, m] with these largest values, as stored, and the second scale or None."""
    amax = amax.astype(jnp.float32)
    if form.scale == 'e4m3':
        whole = jnp.max(amax, axis=(-2, -1), keepdims=True)
        ratio = low.exact_divide(whole, form.largest * low.E4M3_MAX)
        second = _or_one(ratio) if scale_2 is None else jnp.asarray(scale_2)
        relative = low.exact_divide(amax, form.largest * second)
        relative = jnp.where(amax > 0, jnp.clip(relative, _LEAST_E4M3, low.E4M3_MAX), 1.0)
        return low.to_e4m3(relative), second
    if form.scale == 'e8m0':
        code = low.to_power_of_two(amax, form.largest)
        return code if form.is_mx else jnp.where(amax > 0, code, _E8M0_ONE).astype(code.dtype), None
    if form.scale == 'power_of_two':
        code = jnp.maximum(low.to_power_of_two(amax, form.largest), 1)
        return jnp.where(amax > 0, low.from_e8m0(code), 1.0), None
    scale = low.exact_divide(amax, form.largest)
    if form.scale == 'e4m3_grid':
        whole = jnp.max(amax, axis=(-2, -1), keepdims=True)
        second = _or_one(low.exact_divide(whole, low.E4M3_MAX)) if scale_2 is None else jnp.asarray(scale_2)
        return _or_one(scale), second
    return _or_one(scale), None


def number_of(scale: jax.Array, scale_2: Array | None, form: Format) -> jax.Array:
    """The float32 multipliers of blocks, from their scales as stored."""
    if form.scale == 'e8m0':
        return low.from_e8m0(scale)
    wide = scale.astype(jnp.float32)
    return wide * jnp.asarray(scale_2) if form.scale == 'e4m3' else wide


def spread(per_block: jax.Array, shape: tuple[int, ...], form: Format) -> jax.Array:
    """A value per block, [..., out / rows, in / columns], for every element of a weight of this shape."""
    out, inner = shape[-2:]
    for axis, size, block in ((-2, out, form.rows or out), (-1, inner, form.columns or inner)):
        if per_block.shape[axis] > 1 and block > 1:
            # Not jnp.repeat: a gather, for which a sharded operand would travel.
            at = per_block.ndim + axis + 1
            wide = jnp.broadcast_to(
                jnp.expand_dims(per_block, at), (*per_block.shape[:at], block, *per_block.shape[at:])
            )
            per_block = wide.reshape(*per_block.shape[: at - 1], -1, *per_block.shape[at:])
            per_block = jax.lax.slice_in_dim(per_block, 0, size, axis=at - 1)
    return jnp.broadcast_to(per_block, shape)


def _or_one(scale: jax.Array) -> jax.Array:
    return jnp.where(scale > 0, scale, 1.0)


def _whole_blocks(weight: jax.Array, rows: int, columns: int) -> jax.Array:
    """The weight with zeros at the edges, so that blocks divide it."""
    out, inner = weight.shape[-2:]
    short = -out % rows, -inner % columns
    return jnp.pad(weight, [*[(0, 0)] * (weight.ndim - 2), (0, short[0]), (0, short[1])]) if any(short) else weight


def codes_with(
    wide: jax.Array,
    scale: jax.Array,
    scale_2: Array | None,
    form: Format,
    of_elements: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The codes, as stored, of float32 numbers with these scales of blocks, which `of_elements` gives every element."""
    if form.scale == 'e8m0':  # exact, and 2^-127 is no divisor where subnormal numbers count as zero
        return codes_of(wide * of_elements(low.from_e8m0(254 - scale)), form)
    return codes_of(low.exact_divide(wide, of_elements(number_of(scale, scale_2, form))), form)


def codes_of(quotients: jax.Array, form: Format) -> jax.Array:
    """The codes of weight / scale, as stored."""
    match form.element:
        case 'e4m3':
            return low.to_e4m3(quotients)
        case 'e2m1':
            return low.pack(low.to_e2m1(quotients))
        case 'int8':
            return low.to_integer(quotients, form.largest)
        case 'int4':
            return low.pack(low.to_integer(quotients, form.largest))


def _elements(codes: jax.Array, form: Format) -> jax.Array:
    """The numbers, float32, that codes stand for before scaling."""
    match form.element:
        case 'e2m1':
            return low.from_e2m1(low.unpack(codes))
        case 'int4':
            return low.signed(low.unpack(codes)).astype(jnp.float32)
        case _:
            return codes.astype(jnp.float32)
