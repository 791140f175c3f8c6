"""Weights divided over `fsdp`, gathered where they are used; gradients return in float32.

Arrays travel in the compute dtype. Weights that are trained through rounding travel as what they are rounded to: codes
are made once, of the parts, and they and their scales are 0.5 to 1.03 bytes each. They travel as they are where an odd
part would cut a byte of two inputs, beside factors of inputs, and for Transformer Engine.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jpt.kernels.local import auto_size, axis_index, axis_size, local, manual, pmax
from jpt.quant.formats import Format
from jpt.quant.packing import parts_of
from jpt.quant.tensors import FakeQuant, QTensor, block_amax, codes_with, quantize, scales_of, spread, within
from jpt.sharding.rules import MESH_AXES, REPLICABLE, Units, logical_axes, path_keys

AXIS = 'fsdp'
INNER = ('tensor',)  # the axis that stays automatic around a gather
# Parts of a weight that a product reads in the compute dtype; codes and scales of quantized weights keep theirs.
CAST = ('kernel', 'embedding', 'base', 'a', 'b')


def gathering() -> bool:
    """Whether `fsdp` is here an axis along which every device holds a part of the weights."""
    return bool(manual((AXIS,)))


def gather(tree: Any, dtype: DTypeLike | None, units: Units | None = None) -> Any:
    """The whole weights of a tree of local parts: one layer, or what is not in layers. Itself where nothing is divided.

    Which dimension is divided follows from a leaf's path (rules.py). Matrices are cast to `dtype` before they travel
    (None: no cast). The transpose sums all devices' cotangents in at least float32, and scatters them to the parts.
    What `tensor` divides stays divided. units: of the layers, some of which are whole where `tensor` does not divide
    them.
    """
    if not gathering():
        return tree
    each = functools.partial(_gather_leaf, dtype, units)
    return jax.tree_util.tree_map_with_path(each, tree, is_leaf=lambda leaf: isinstance(leaf, QTensor | FakeQuant))


def _gather_leaf(dtype: DTypeLike | None, units: Units | None, path: tuple[Any, ...], leaf: Any) -> Any:
    keys = path_keys(path)
    axes = logical_axes(keys)
    dims = [dim for dim, axis in enumerate(axes) if axis is not None and AXIS in MESH_AXES[axis]]
    if not dims:
        return leaf
    whole = [axis for axis in REPLICABLE if units is not None and getattr(units, axis) % auto_size(INNER)]
    divided = [axis is not None and axis not in whole and INNER[0] in MESH_AXES[axis] for axis in axes]
    spec = P(*(INNER[0] if inner else None for inner in divided))
    if isinstance(leaf, QTensor):
        return _gather_quantized(leaf, dims[0], spec)
    if isinstance(leaf, FakeQuant):
        return _gather_fake(leaf, dims[0], spec)
    return _gather(leaf, dims[0], spec, leaf.dtype if dtype is None or keys[-1] not in CAST else jnp.dtype(dtype))


def _gather_quantized(weight: QTensor, dim: int, spec: P) -> QTensor:
    """The whole of a quantized weight: codes travel as they are, and scales where they are divided like their weight.

    dim, spec: of the weight, as for an array. Nothing of it has a gradient.
    """
    specs, axis = weight.part_specs(spec, {name: auto_size((name,)) for name in INNER}), dim - weight.ndim
    block = {-2: weight.format.rows, -1: weight.format.columns}.get(axis, 1)
    divided = {
        'codes': axis,
        'scale': axis if block and weight.shape[axis] % block == 0 else None,
        'input_factor': {-1: -1}.get(axis, None if axis == -2 else axis + 1),
        'scale_2': axis if axis < -2 else None,
        'input_scale': axis + 2 if axis < -2 else None,
    }
    found: dict[str, Any] = {}
    for name, part in parts_of(weight).items():
        at = divided[name]
        gathered = functools.partial(
            jax.lax.all_gather, axis_name=AXIS, axis=0 if at is None else part.ndim + at, tiled=True
        )
        place = getattr(specs, name)
        found[name] = part if at is None else local(gathered, place, place, INNER)(jax.lax.stop_gradient(part))
    return dataclasses.replace(weight, **found)


def _gather_fake(kernel: FakeQuant, dim: int, spec: P) -> FakeQuant:
    """The whole of a weight that is trained through rounding: its parts are rounded first, if that can be."""
    cut = kernel.format.packed and kernel.shape[-1] % 2  # two inputs that share a byte
    if kernel.gradients == 'te' or kernel.input_factor is not None or cut:
        return dataclasses.replace(kernel, weight=_gather(kernel.weight, dim, spec, kernel.dtype))
    given = jax.lax.stop_gradient((kernel.weight, kernel.scale_2))
    rounded = _gather_rounded(*given, kernel.format, dim, spec)
    return dataclasses.replace(kernel, weight=_no_numbers(kernel, dim, spec), rounded=rounded)


# A function of its own for the sake of remat: what lies between the part and the codes is not seen, and not kept.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _gather_rounded(part: jax.Array, second: jax.Array | None, form: Format, dim: int, spec: P) -> QTensor:
    """The whole of a weight, rounded, from its parts: what rounding the whole gives, bit by bit. It has no gradient."""
    axis = dim - part.ndim
    block = {-2: form.rows, -1: form.columns}.get(axis, 1)
    if block and part.shape[dim] % block:
        return _gather_quantized(_rounded_part(part, second, form, axis), dim, spec)
    amax = block_amax(part.astype(jnp.float32), form)
    if not block:
        amax = pmax(amax, (AXIS,))
    if form.has_second and second is None:
        largest = jnp.max(amax, axis=(-2, -1), keepdims=True)
        second = scales_of(largest if axis < -2 else pmax(largest, (AXIS,)), form)[1]
    return _gather_quantized(quantize(part, form, amax=amax, scale_2=second), dim, spec)


def _rounded_part(part: jax.Array, second: jax.Array | None, form: Format, axis: int) -> QTensor:
    """The codes of a part that ends within a block, beside the scales of the whole weight.

    Blocks are made of pieces that divide parts as well; the largest values of blocks are found over all devices.
    """
    block, wide = form.rows if axis == -2 else form.columns, part.astype(jnp.float32)
    piece = math.gcd(block, part.shape[axis])
    if axis == -2:
        pieces = dataclasses.replace(form, rows=piece)
        joined = dataclasses.replace(form, rows=block // piece, columns=1)
    else:
        pieces = dataclasses.replace(form, columns=piece)
        joined = dataclasses.replace(form, rows=1, columns=block // piece)
    mine = block_amax(wide, pieces)
    own, devices = mine.shape[axis], axis_size((AXIS,))
    at = axis_index((AXIS,)) * own
    shape = list(mine.shape)
    shape[axis] *= devices
    every = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(shape, jnp.float32), mine, at, axis)
    scale, second = scales_of(pmax(block_amax(every, joined), (AXIS,)), form, second)

    def of_elements(per_block: jax.Array) -> jax.Array:
        per_piece = spread(per_block, every.shape, joined)
        return spread(jax.lax.dynamic_slice_in_dim(per_piece, at, own, axis), wide.shape, pieces)

    codes = codes_with(wide, scale, second, form, of_elements)
    return QTensor(codes, scale, second, format=form, weight_dtype=part.dtype.name)


_gather_rounded.defvjp(lambda *given: (_gather_rounded(*given), None), lambda *_: (None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _no_numbers(kernel: FakeQuant, dim: int, spec: P) -> jax.Array:
    """Zeros in the shape of the whole weight, whose gradient goes to the parts as that of a gathered one does."""
    part = kernel.weight
    return jnp.zeros((*part.shape[:dim], axis_size((AXIS,)) * part.shape[dim], *part.shape[dim + 1 :]), part.dtype)


def _no_numbers_backward(dim: int, spec: P, kernel: FakeQuant, whole: jax.Array) -> tuple[FakeQuant]:
    (part,) = _gather_backward(dim, spec, kernel.dtype, jnp.zeros((0,), kernel.dtype), whole)
    zeros = jax.tree.map(jnp.zeros_like, kernel)
    return (dataclasses.replace(zeros, weight=within(kernel, part)),)


_no_numbers.defvjp(lambda kernel, dim, spec: (_no_numbers(kernel, dim, spec), kernel), _no_numbers_backward)


# Both directions run on the shards of `tensor`: a hand-written collective over fsdp would have the compiler gather what
# `tensor` divides first, and slice it again afterwards.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: jax.Array, dim: int, spec: P, dtype: jnp.dtype) -> jax.Array:
    def whole(part: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part.astype(dtype), AXIS, axis=dim, tiled=True)

    return local(whole, spec, spec, INNER)(part)


def _gather_forward(part: jax.Array, dim: int, spec: P, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return _gather(part, dim, spec, dtype), jnp.zeros((0,), part.dtype)  # remembers the dtype of the cotangent


def _gather_backward(dim: int, spec: P, dtype: jnp.dtype, empty: jax.Array, whole: jax.Array) -> tuple[jax.Array]:
    def scattered(whole: jax.Array) -> jax.Array:
        wide = whole.astype(jnp.promote_types(dtype, jnp.float32))
        return jax.lax.psum_scatter(wide, AXIS, scatter_dimension=dim, tiled=True).astype(empty.dtype)

    return (local(scattered, spec, spec, INNER)(whole),)


_gather.defvjp(_gather_forward, _gather_backward)


def keep_activations(parts: Any) -> Callable[..., bool]:
    """A jax.checkpoint policy for a layer with these parts of weights: keep what has batch, length and width.

    The rest is cheap or a weight. A gathered kernel [out, in], and whatever is made of it alone, is thus gathered once
    more for the backward pass instead of being held for every layer. Experts' kernels have three axes too: they are
    known by their shapes.
    """
    shards = axis_size((AXIS,))
    weights = set()
    for leaf in jax.tree.leaves(parts):
        if leaf.ndim >= 3:
            wholes = [(*leaf.shape[:at], n * shards, *leaf.shape[at + 1 :]) for at, n in enumerate(leaf.shape)]
            weights |= {leaf.shape, *wholes}

    def keep(primitive: Any, *operands: Any, **params: Any) -> bool:
        del primitive, params
        shapes = [operand.shape for operand in operands if getattr(operand, 'ndim', 0) >= 2]
        return any(len(shape) >= 3 for shape in shapes) and not all(shape in weights for shape in shapes)

    return keep
