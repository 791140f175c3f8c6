"""Quantizing a model that is larger than memory: weights are read, rounded and handed on a piece of a matrix at a time.

What comes out is what `jpt.quant.tensors.quantize` gives for the whole weight, bit by bit: a piece holds whole blocks,
and what is known only of more than a piece (the largest value of a column, NVFP4's second scale) is measured in a pass
of its own before.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.checkpoint.dtypes import is_floating
from jpt.checkpoint.source import Index, LeafSource
from jpt.checkpoint.tree import name_of
from jpt.models.names import Leaf, TreePath, leaves
from jpt.quant.amax_search import searched_amax
from jpt.quant.formats import FORMATS, Format
from jpt.quant.packing import Packing
from jpt.quant.tensors import BEYOND, QTensor, block_amax, number_of, numbers_of, quantize, scales_of, spread
from jpt.quantization.inputs import second_groups
from jpt.quantization.run import LayerReport

READ = 32 * 2**20  # elements of a matrix that are read at a time, as far as blocks allow
PIECE = 2 * 2**20  # of them, that are quantized at a time: more would leave the processor's caches
Place = tuple[int, ...]  # of a matrix on the leading axes of its leaf


class _Weight(NamedTuple):
    """A weight that is quantized on the way."""

    leaf: Leaf
    form: Format

    @property
    def name(self) -> str:
        return name_of(self.leaf.path)

    @property
    def sides(self) -> tuple[int, int]:
        return self.leaf.shape[-2], self.leaf.shape[-1]

    def elements(self, part: str, rows: range, columns: range) -> tuple[slice, slice]:
        """The elements of a matrix that some rows and columns of its codes or of its scales come from: whole blocks.

        Where all rows have one scale it is known beforehand, and the rows alone are needed.
        """
        form, (out, inner) = self.form, self.sides
        if part == 'scale':
            touched = _times(rows, form.rows or out, out), _times(columns, form.columns or inner, inner)
        else:
            touched = slice(rows[0], rows[-1] + 1), _times(columns, 2 if form.packed else 1, inner)
        unit = math.lcm(form.columns, 2) if form.packed else form.columns
        return _aligned(touched[0], form.rows or 1, out), _aligned(touched[1], unit or inner, inner)

    def blocks(self, elements: tuple[slice, slice]) -> tuple[slice, slice]:
        """The scales of these elements, which begin and end with blocks."""
        rows, columns = elements
        return _over(rows, self.form.rows), _over(columns, self.form.columns)

    def pieces(self, rows: slice, columns: slice, most: int) -> Iterator[slice]:
        """Rows of about `most` elements, all alike but the last: few programs are compiled."""
        count, width = rows.stop - rows.start, columns.stop - columns.start
        ways = max(1, round(count * width / most))
        unit = self.form.rows or 1
        step = unit * -(-count // (ways * unit))
        for first in range(rows.start, rows.stop, step):
            yield slice(first, min(first + step, rows.stop))


class _Piece(NamedTuple):
    """A piece of a weight: of which matrix, which elements, as what, and what was measured.

    measured: its largest value; where that was wanted, the sum of its squares, its errors and how many are clipped too.
    """

    place: Place
    elements: tuple[slice, slice]
    tensor: QTensor
    measured: tuple[Any, ...]


class _Sums(NamedTuple):
    """Of a piece of a weight: its largest absolute value, squares of it and of its errors, and how many are clipped."""

    largest: float
    size: float
    error: float
    clipped: float
    elements: int


class QuantizedSource:
    """The model of `source` with some of its weights as codes and scales, which are made as they are asked for.

    No more of a weight is read than the blocks that a part touches, and once, where its codes are asked for before its
    scales as all who write do. It is read once more, beforehand, where all rows share a scale or all of the weight a
    second one; weights that read the same input share their second scale, so all of them are.

    Args:
        source: the model; the weights that have a format are as they are.
        formats: by path, see jpt.quant.recipes.chosen.
        search: take the scales with the least squares of errors, see jpt/quant/amax_search.py.

    Raises:
        ValueError: a path that is no weight, or of one that is quantized already; a format with a static scale of
            inputs, which only calibration knows; a weight in 64 bits; a search for a scale of all rows.
    """

    def __init__(self, source: LeafSource, formats: Mapping[str, Format], search: bool = False) -> None:
        self.cfg, self._source, self._search = source.cfg, source, search
        self._weights: dict[TreePath, _Weight] = {}
        own: dict[TreePath, Packing] = {}
        for leaf in leaves(source.cfg):
            form = formats.get(name_of(leaf.path))
            if form is not None:
                if leaf.path in source.quantized:
                    raise ValueError(f'{name_of(leaf.path)}: is quantized already; ask for a dtype when opening')
                dtype = source.dtype(leaf)
                self._weights[leaf.path] = _Weight(leaf, form)
                _check(self._weights[leaf.path], dtype, search)
                own[leaf.path] = Packing(form, str(dtype))
        unknown = sorted(set(formats) - {each.name for each in self._weights.values()})
        if unknown:
            raise ValueError(f'formats: {", ".join(unknown)}: expected the paths of weights of the model')
        self.quantized: Mapping[TreePath, Packing] = {**source.quantized, **own}
        self._second: dict[str, np.ndarray] = {}
        self._limits: dict[tuple[str, Place], np.ndarray] = {}
        # Scales whose codes were given, by the place of their matrix, and which of them are there.
        self._kept: tuple[TreePath, dict[Place, tuple[np.ndarray, np.ndarray]]] = ((), {})
        self._sums: dict[str, dict[tuple[Place, int, int], _Sums]] = {each.name: {} for each in self._weights.values()}

    def dtype(self, leaf: Leaf) -> np.dtype:
        """That of the source, or of a part of a quantized weight."""
        weight = self._weight(leaf)
        if weight is None:
            return self._source.dtype(leaf)
        return self.quantized[weight.leaf.path].parts(weight.leaf.shape)[str(leaf.part)].dtype

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf.

        Raises:
            ValueError: a weight that holds NaN or infinities, by its name and layer.
        """
        weight = self._weight(leaf)
        if weight is None:
            return self._source.read(leaf, index)
        if leaf.part == 'scale_2':
            return self._seconds(weight)[index]
        ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
        result = np.empty([len(each) for each in ranges], self.dtype(leaf))
        if not result.size:
            return result
        *lead, rows, columns = ranges
        places = {to: tuple(each[i] for each, i in zip(lead, to, strict=True)) for to in np.ndindex(result.shape[:-2])}
        if self._kept[0] != weight.leaf.path:
            self._kept = (weight.leaf.path, {})
        if leaf.part == 'codes':
            self._fill_codes(weight, places, rows, columns, result)
        else:
            self._fill_scales(weight, places, rows, columns, result)
        return result

    def reports(self) -> list[LayerReport]:
        """What the weights whose codes were asked for lost, by layer, the worst first."""
        found = []
        for weight in self._weights.values():
            segment, kind = map(int, weight.leaf.path[1:3])
            sums = self._sums[weight.name]
            for repeat in sorted({place[0] for place, _, _ in sums}):
                parts = [each for (place, _, _), each in sums.items() if place[0] == repeat]
                size, error = (math.fsum(getattr(each, name) for each in parts) for name in ('size', 'error'))
                clipped = sum(each.clipped for each in parts) / sum(each.elements for each in parts)
                largest, relative = max(each.largest for each in parts), math.sqrt(error / size) if size else 0.0
                layer = self.cfg.layer_index(segment, kind, repeat)
                found.append(LayerReport(layer, weight.name, weight.form, largest, relative, clipped, None))
        return sorted(found, key=lambda one: -one.error)

    def _weight(self, leaf: Leaf) -> _Weight | None:
        return None if leaf.part is None else self._weights.get(leaf.path[:-1])

    def _fill_codes(
        self, weight: _Weight, places: Mapping[Place, Place], rows: range, columns: range, result: np.ndarray
    ) -> None:
        """Codes of some matrices, which are quantized one piece behind what is being read."""
        elements = weight.elements('codes', rows, columns)
        packed = 2 if weight.form.packed else 1
        within = slice(columns[0] - elements[1].start // packed, columns[-1] + 1 - elements[1].start // packed)
        within = slice(within.start, within.stop, columns.step)
        for to, (place, where, tensor, measured) in self._quantized(weight, places, elements, measure=True):
            first = where[0].start
            self._sums[weight.name][place, first, where[1].start] = self._summed(weight, place, measured)
            codes = np.asarray(tensor.codes)
            begin, end = (max(0, -(-(row - rows.start) // rows.step)) for row in (first, first + len(codes)))
            held = codes[rows.start + begin * rows.step - first :: rows.step, within]
            result[to][begin:end] = held[: len(rows) - begin]

    def _fill_scales(
        self, weight: _Weight, places: Mapping[Place, Place], rows: range, columns: range, result: np.ndarray
    ) -> None:
        """Scales of some matrices: those that are kept, else quantized for them."""
        elements = weight.elements('scale', rows, columns)
        wanted = weight.blocks(elements)
        kept = self._kept[1]
        absent = {to: at for to, at in places.items() if at not in kept or not kept[at][1][wanted].all()}
        for _, (place, _, _, (largest, *_)) in self._quantized(weight, absent, elements):
            self._check_finite(weight, place, largest)
        pick = slice(rows[0], rows[-1] + 1, rows.step), slice(columns[0], columns[-1] + 1, columns.step)
        for to, place in places.items():
            result[to] = kept[place][0][pick]
        for place in set(places.values()):
            if kept[place][1][wanted].size == kept[place][1].size:
                del kept[place]

    def _quantized(
        self, weight: _Weight, places: Mapping[Place, Place], elements: tuple[slice, slice], measure: bool = False
    ) -> Iterator[tuple[Place, _Piece]]:
        """Pieces of these elements of matrices, with the key of each matrix in `places`; their scales are kept."""
        waiting: tuple[Place, _Piece] | None = None
        for to, place in places.items():
            for rows, values in self._read(weight, place, elements):
                made = self._start(weight, place, (rows, elements[1]), values, measure)
                if waiting is not None:
                    self._keep(weight, waiting[1])
                    yield waiting
                waiting = to, made
        if waiting is not None:
            self._keep(weight, waiting[1])
            yield waiting

    def _read(self, weight: _Weight, place: Place, elements: tuple[slice, slice]) -> Iterator[tuple[slice, np.ndarray]]:
        """Elements of a matrix by pieces: their rows, and the values."""
        here, (rows, columns) = tuple(slice(at, at + 1) for at in place), elements
        for together in weight.pieces(rows, columns, READ):
            values = self._source.read(weight.leaf, (*here, together, columns))[(0,) * len(place)]
            for part in weight.pieces(together, columns, PIECE):
                yield part, values[part.start - together.start : part.stop - together.start]

    def _start(
        self, weight: _Weight, place: Place, elements: tuple[slice, slice], values: np.ndarray, measure: bool
    ) -> _Piece:
        """Has a piece quantized, and measured if that is wanted; neither is waited for."""
        form, second, limit = weight.form, None, None
        if form.has_second:
            second = self._seconds(weight)[place]
        if not form.rows and elements[0] != slice(0, weight.sides[0]):
            limit = self._limit(weight, place)[:, weight.blocks(elements)[1]]
        given = jax.device_put(values)
        tensor, largest = _rounded(given, form, self._search, limit, second)
        if not measure:
            return _Piece(place, elements, tensor, (largest,))
        # Other scales are at or above what holds the largest value of their block.
        clipped = _clipped(given, tensor) if self._search or form.has_second else 0
        return _Piece(place, elements, tensor, (largest, _size(given), _errors(given, tensor), clipped))

    def _keep(self, weight: _Weight, piece: _Piece) -> None:
        """Keeps the scales of a piece."""
        kept, scale = self._kept[1], np.asarray(piece.tensor.scale)
        if piece.place not in kept:
            shape = weight.form.scales_of(weight.sides)
            kept[piece.place] = np.empty(shape, scale.dtype), np.zeros(shape, bool)
        scales, there = kept[piece.place]
        where = weight.blocks(piece.elements)
        scales[where], there[where] = scale, True

    def _summed(self, weight: _Weight, place: Place, measured: tuple[Any, ...]) -> _Sums:
        largest, size, errors, clipped = measured
        self._check_finite(weight, place, largest)
        flat = np.asarray(errors).reshape(-1)
        return _Sums(float(largest), float(size), float(np.dot(flat, flat)), float(clipped), flat.size)

    def _check_finite(self, weight: _Weight, place: Place, largest: Any) -> None:
        """Raises ValueError where the largest value, or one of several, is no number."""
        if not np.isfinite(np.asarray(largest)).all():
            segment, kind = map(int, weight.leaf.path[1:3])
            expert = f', expert {place[1]}' if len(place) > 1 else ''
            where = f'layer {self.cfg.layer_index(segment, kind, place[0])}{expert}'
            raise ValueError(f'{weight.name}: holds NaN or infinities in {where}: expected finite weights')

    def _limit(self, weight: _Weight, place: Place) -> np.ndarray:
        """The largest values of a matrix by block of columns, over all of its rows: [1, in / columns] float32."""
        if (weight.name, place) not in self._limits:
            found = np.max([_largest(piece, weight.form) for piece in self._pieces(weight, place)], axis=0)
            self._check_finite(weight, place, found)
            self._limits[weight.name, place] = found
        return self._limits[weight.name, place]

    def _seconds(self, weight: _Weight) -> np.ndarray:
        """The second scales of a weight, [..., 1, 1]; those of all that read the same input are found together."""
        if weight.name not in self._second:
            weights = {each.name: each for each in self._weights.values()}
            groups = second_groups({name: each.form for name, each in weights.items()})
            group = next(group for group in groups if weight.name in group)
            own = [self._own_second(weights[name]) for name in group]
            self._second |= dict.fromkeys(group, np.max(own, axis=0))
        return self._second[weight.name]

    def _own_second(self, weight: _Weight) -> np.ndarray:
        lead = weight.leaf.shape[:-2]
        largest = np.empty((*lead, 1, 1), np.float32)
        for place in np.ndindex(lead):
            found = [np.max(_largest(piece, weight.form)) for piece in self._pieces(weight, place)]
            largest[place] = np.max(found)
            self._check_finite(weight, place, largest[place])
        return np.asarray(scales_of(jnp.asarray(largest), weight.form)[1])

    def _pieces(self, weight: _Weight, place: Place) -> Iterator[np.ndarray]:
        """All of a matrix."""
        out, inner = weight.sides
        return (piece for _, piece in self._read(weight, place, (slice(0, out), slice(0, inner))))


def _check(weight: _Weight, dtype: np.dtype, search: bool) -> None:
    form = weight.form
    if form.takes_input_scale:
        raise ValueError(
            f'{weight.name}: {form}: has a static scale of inputs, which only a pass over text gives: expected one of '
            f'{", ".join(name for name, each in FORMATS.items() if not each.takes_input_scale)}'
        )
    if not is_floating(dtype) or dtype.itemsize not in (2, 4):
        raise ValueError(f"{weight.name}: is {dtype}: expected 16 or 32 bits; ask for a dtype such as 'bfloat16'")
    if search and not form.rows:
        raise ValueError(
            f'{weight.name}: {form}: has scales of all rows, for which there is no search a piece at a time'
        )
    form.check(weight.leaf.shape, weight.name)


@partial(jax.jit, static_argnums=1)
def _largest(piece: jax.Array, form: Format) -> jax.Array:
    return block_amax(piece.astype(jnp.float32), form)


@partial(jax.jit, static_argnums=(1, 2))
def _rounded(
    piece: jax.Array, form: Format, search: bool, limit: jax.Array | None, second: jax.Array | None
) -> tuple[QTensor, jax.Array]:
    """A piece quantized, and its largest absolute value. `limit` stands for those of its blocks."""
    amax = block_amax(piece.astype(jnp.float32), form)
    wanted = amax if limit is None else limit
    if search:
        wanted, _ = searched_amax(piece, form, scale_2=second)
    return quantize(piece, form, amax=wanted, scale_2=second), jnp.max(amax)


# Programs of their own, and squares of errors added up by numpy: in one program XLA takes twice as long for all.
@jax.jit
def _errors(piece: jax.Array, tensor: QTensor) -> jax.Array:
    return piece.astype(jnp.float32) - numbers_of(tensor)


@jax.jit
def _size(piece: jax.Array) -> jax.Array:
    """The sum of the squares."""
    return jnp.sum(jnp.sum(jnp.square(piece.astype(jnp.float32)), axis=-1))


@jax.jit
def _clipped(piece: jax.Array, tensor: QTensor) -> jax.Array:
    """How many elements are beyond the largest number of their block."""
    form, scale = tensor.format, number_of(jnp.asarray(tensor.scale), tensor.scale_2, tensor.format)
    largest = spread(form.largest * BEYOND * scale, piece.shape, form)
    return jnp.sum(jnp.sum((jnp.abs(piece.astype(jnp.float32)) > largest).astype(jnp.float32), axis=-1))


def _times(part: range, block: int, size: int) -> slice:
    """The elements of blocks."""
    return slice(part[0] * block, min((part[-1] + 1) * block, size))


def _aligned(part: slice, block: int, size: int) -> slice:
    """The elements of the blocks that elements touch."""
    return slice(part.start // block * block, min(-(-part.stop // block) * block, size))


def _over(part: slice, block: int) -> slice:
    """The blocks of elements; 0: all of them are one."""
    return slice(part.start // block, -(-part.stop // block)) if block else slice(0, 1)
