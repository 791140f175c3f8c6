"""A model with quantized weights as the numbers that these stand for: for training, merging and other formats."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import DTypeLike

from jpt.checkpoint.dtypes import cast, cast_target, is_floating
from jpt.checkpoint.source import NOT_QUANTIZED, Index, LeafSource, leaves_of
from jpt.models.names import Leaf
from jpt.quant.dot import dense
from jpt.quant.packing import Packing

_dense = jax.jit(dense)


class DequantizedSource:
    """The model of `source` without codes and scales.

    Args:
        source: the model.
        dtype: of the weights; None: each as it was before it was quantized.
    """

    quantized = NOT_QUANTIZED

    def __init__(self, source: LeafSource, dtype: DTypeLike | None = None) -> None:
        self.cfg = source.cfg
        self._source, self._target = source, cast_target(dtype)
        self._parts = {leaf.path: leaf for leaf in leaves_of(source)}

    def dtype(self, leaf: Leaf) -> np.dtype:
        """What was asked for, else that of the weight before it was quantized."""
        packing = self._source.quantized.get(leaf.path)
        stored = self._source.dtype(leaf) if packing is None else np.dtype(packing.weight_dtype)
        return self._target if self._target is not None and is_floating(stored) and leaf.castable else stored

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf; of a quantized one no more is read than the blocks that it touches."""
        packing = self._source.quantized.get(leaf.path)
        target = self._target if leaf.castable else None
        if packing is None:
            return cast(self._source.read(leaf, index), target)

        def read(name: str, where: Index) -> np.ndarray:
            return self._source.read(self._parts[*leaf.path, name], where)

        return numbers_at(packing, leaf.shape, index, read).astype(self.dtype(leaf))


def numbers_at(
    packing: Packing, shape: tuple[int, ...], index: Index, read: Callable[[str, Index], np.ndarray]
) -> np.ndarray:
    """A part of what a quantized weight of this shape stands for, float32, so that it is rounded once if at all.

    read: gives a part of one of its arrays, by its name and index.
    """
    *lead, rows, columns = (slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
    form, (out, inner) = packing.form, shape[-2:]
    in_rows, own_rows = _blocks(rows, form.rows, out)
    in_columns, own_columns = _blocks(columns, form.columns, inner, even=form.packed)
    parts = {}
    for name in packing.parts(shape):
        where = {
            'codes': (own_rows, _halved(own_columns) if form.packed else own_columns),
            'scale': (in_rows, in_columns),
            'scale_2': (slice(0, 1), slice(0, 1)),
            'input_scale': (),
            'input_factor': (own_columns,),
        }[name]
        parts[name] = read(name, (*lead, *where))
    numbers = np.asarray(_dense(packing._replace(weight_dtype='float32').assembled(parts)))
    cut_rows, cut_columns = _within(rows, own_rows), _within(columns, own_columns)
    return numbers[..., cut_rows, cut_columns]


def _blocks(part: slice, block: int, size: int, even: bool = False) -> tuple[slice, slice]:
    """The blocks that a part of an axis touches, and the elements that are read; 0: one block is all of the axis.

    even: two elements share a byte, so these begin and end at even ones.
    """
    if not block:
        return slice(0, 1), slice(part.start - part.start % 2, part.stop + part.stop % 2) if even else part
    unit = math.lcm(block, 2) if even else block
    first, last = part.start // unit, -(-part.stop // unit)
    last_block = min(last * unit // block, -(-size // block))
    return slice(first * unit // block, last_block), slice(first * unit, min(last * unit, size))


def _within(part: slice, held: slice) -> slice:
    return slice(part.start - held.start, part.stop - held.start, part.step)


def _halved(part: slice) -> slice:
    return slice(part.start // 2, part.stop // 2)
