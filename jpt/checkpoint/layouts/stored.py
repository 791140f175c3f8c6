"""How a part of a quantized matrix lies in one tensor of a file: under which name, in which dtype, shape and order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jpt.checkpoint.dtypes import E8M0, SAFETENSORS_DTYPES
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.source import Index
from jpt.models.names import TreePath
from jpt.quant.formats import Format
from jpt.quant.packing import Packing

Shape = tuple[int, ...]
WEIGHT = 'weight'
Axes = Literal['same', 'rows', 'scalar', 'one', 'blocks']
FLOATS = ('F32', 'BF16', 'F16')  # all of them exact in float32


class Order(Protocol):
    """How the elements of a part lie in a tensor."""

    @property
    def rows(self) -> int:
        """How many rows of the part a row of the tensor holds."""

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that the tensor of a part of this shape may have; the first is written."""

    def read(self, tensor: np.ndarray, shape: Shape, index: Index) -> np.ndarray:
        """A piece of a part of this shape."""

    def write(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """The rows of the tensor that hold these rows of the part."""


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """The same elements in the same order, with other axes.

    axes: 'same'; 'rows', a vector [out] for [out, 1]; 'scalar', [] for one number; 'one', [1] for one number; 'blocks',
        [n, 1, m, 1] for [n, m], where a single block may have no axes and is written so, as ModelOpt does.
    """

    axes: Axes = 'same'
    rows: int = 1

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that the tensor may have; the first is written."""
        match self.axes:
            case 'rows':
                return ((shape[0],),)
            case 'scalar':
                return ((), (1,))
            case 'one':
                return ((1,), ())
            case 'blocks':
                four = (shape[0], 1, shape[1], 1)
                return ((), four) if math.prod(shape) == 1 else (four,)
            case 'same':
                return (shape,)

    def read(self, tensor: np.ndarray, shape: Shape, index: Index) -> np.ndarray:
        """A piece of a part of this shape."""
        return tensor.reshape(shape)[index]

    def write(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """The rows of the tensor that hold these rows of the part."""
        to = self.shapes(shape)[0]
        return rows.reshape((-1, *to[1:]) if to else ())


@dataclasses.dataclass(frozen=True)
class PairedRows:
    """Bytes [out / 2, in] of two rows each, the first in the low half, for bytes [out, in / 2] of two columns."""

    rows: int = 2

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that the tensor may have; the first is written."""
        return ((-(-shape[0] // 2), 2 * shape[1]),)

    def read(self, tensor: np.ndarray, shape: Shape, index: Index) -> np.ndarray:
        """A piece of a part of this shape."""
        rows, columns = (slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        pairs = tensor[rows.start // 2 : -(-rows.stop // 2), 2 * columns.start : 2 * columns.stop]
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1, pairs.shape[1])
        codes = codes[rows.start % 2 :][: rows.stop - rows.start]
        return (codes[:, ::2] | codes[:, 1::2] << 4)[:: rows.step, :: columns.step]

    def write(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """The rows of the tensor that hold these rows of the part."""
        codes = np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)
        return codes[::2] | codes[1::2] << 4


@dataclasses.dataclass(frozen=True)
class Words:
    """Bytes of a row four to an int32, the first lowest, with the sign bit of every element turned over.

    An element is stored as element + 2^(bits - 1), which in two's complement is that. The last word of a row is filled
    with zeros.
    """

    signs: int  # 0x88 where a byte holds two elements, 0x80 where it holds one
    rows: int = 1

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that the tensor may have; the first is written."""
        return ((shape[0], -(-shape[1] // 4)),)

    def read(self, tensor: np.ndarray, shape: Shape, index: Index) -> np.ndarray:
        """A piece of a part of this shape."""
        rows, columns = (slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
        first = columns.start // 4
        words = np.ascontiguousarray(tensor[rows, first : -(-columns.stop // 4)])
        held = words.view(np.uint8)[:, columns.start - 4 * first : columns.stop - 4 * first : columns.step]
        return held ^ np.uint8(self.signs)

    def write(self, rows: np.ndarray, shape: Shape) -> np.ndarray:
        """The rows of the tensor that hold these rows of the part."""
        held = rows.view(np.uint8) ^ np.uint8(self.signs)
        return np.pad(held, ((0, 0), (0, -held.shape[1] % 4))).view(np.int32)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a quantized matrix, and the part of a QTensor that it is.

    part: codes, scale, scale_2, input_scale or input_factor; or a scale of a cache, k_scale or v_scale.
    suffix: its name in place of the 'weight' that the matrix would have, or of the scale's own name.
    dtypes: those that it may have, as safetensors names them; the first is written.
    order: how its elements lie.
    narrow: it is written in the dtype of the weight, where that holds all of its numbers exactly.
    optional: matrices have it or not.
    divisor: it holds 1 / x. The reciprocal of a reciprocal may be x's neighbour: no float32 is exact for every x.
    """

    part: str
    suffix: str
    dtypes: tuple[str, ...]
    order: Order = Reshaped()
    narrow: bool = False
    optional: bool = False
    divisor: bool = False

    def name(self, weight: str) -> str:
        """The name of this tensor beside a weight's, or for a scale's."""
        return f'{weight.removesuffix(WEIGHT).removesuffix(self.part)}{self.suffix}'

    def allows(self, dtype: np.dtype) -> bool:
        """Whether the tensor may have this dtype."""
        return dtype in {SAFETENSORS_DTYPES[code] for code in self.dtypes}

    @property
    def dtype(self) -> np.dtype:
        """The dtype that is written."""
        return SAFETENSORS_DTYPES[self.dtypes[0]]

    def read(self, tensor: np.ndarray, shape: Shape, index: Index, dtype: np.dtype) -> np.ndarray:
        """A piece of a part of this shape and dtype, from the tensor; no more of it is read."""
        held = self.order.read(tensor, shape, index)
        if held.dtype == E8M0 or (held.dtype == np.uint8 and dtype == np.int8):
            return held.view(dtype)
        found = held.astype(dtype)
        return np.asarray(1 / found) if self.divisor else found

    def write(self, rows: np.ndarray, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """The rows of the tensor, of this dtype, that hold these rows of a part of this shape."""
        held = self.order.write(_reciprocal(rows) if self.divisor else rows, shape)
        return held.view(dtype) if dtype == E8M0 else held.astype(dtype, copy=False)


def _reciprocal(x: np.ndarray) -> np.ndarray:
    """Of numbers of float32: 1 / x, or a neighbour whose own reciprocal is x where that of 1 / x is not."""
    found = np.asarray(1 / x)
    for other in (np.nextafter(found, np.float32(np.inf)), np.nextafter(found, np.float32(0))):
        found = np.where((1 / found != x) & (1 / other == x), other, found)
    return found


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How matrices of one format lie in files.

    label: what its layout calls it.
    form: the format.
    tensors: one for every part.
    beside: the suffix of a tensor int64 [2] with the shape of the matrix, where there is one.
    """

    label: str
    form: Format
    tensors: tuple[Stored, ...]
    beside: str | None = None

    def of(self, part: str) -> Stored:
        """The tensor that is a part."""
        return next(stored for stored in self.tensors if stored.part == part)

    def lacks(self, packing: Packing) -> str | None:
        """What of a weight of this format has no place here, or has to be there and is not; None: nothing."""
        have = {'input_scale': packing.input_scale, 'input_factor': packing.input_factor}
        for part, there in have.items():
            stored = next((each for each in self.tensors if each.part == part), None)
            if there and stored is None:
                return f'{self.label} has no {part}'
            if not there and stored is not None and not stored.optional:
                return f'{self.label} needs an {part}, known beforehand'
        return None


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantized weight of the model: where it stands, the modules that it is in files, and how it is quantized."""

    path: TreePath
    shape: Shape  # of one matrix
    modules: tuple[str, ...]
    packing: Packing


class Said(NamedTuple):
    """What a config says.

    scheme_of: how a module's matrix lies if it is quantized, by the module's name and the tensors there are; None: it
        is not.
    cache: whether keys and values are kept in E4M3.
    cache_fault: why they are kept in a way that jpt does not know, where they are.
    named: modules that the config names as quantized, one by one.
    """

    scheme_of: Callable[[str, Mapping[str, TensorSpec]], Scheme | None]
    cache: bool
    cache_fault: str | None = None
    named: frozenset[str] = frozenset()


class Written(NamedTuple):
    """What is written: `quantization_config` of config.json, and further JSON files by name."""

    config: dict[str, Any]
    files: dict[str, Any]


class CacheLayout(NamedTuple):
    """How the scales of keys and values lie.

    tensors: of every layer, by the scale's name.
    implied: scales that are 1 throughout are not written.
    """

    tensors: Mapping[str, Stored]
    implied: bool


class Layout(Protocol):
    """One layout of quantized weights."""

    @property
    def method(self) -> str:
        """Its `quant_method`."""

    @property
    def cache(self) -> CacheLayout | None:
        """How scales of keys and values lie; None: they have no place."""

    def said(self, given: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Said:
        """What `quantization_config` says, and hf_quant_config.json where that is there.

        Raises:
            ValueError: a field or a value that jpt does not read.
        """

    def scheme(self, matrix: Matrix) -> Scheme:
        """How a matrix lies here.

        Raises:
            ValueError: it cannot, and why.
        """

    def written(self, chosen: Sequence[tuple[Matrix, Scheme]], kept: Kept, cache: bool) -> Written:
        """The config of a model whose quantized matrices lie by these schemes; `cache`: its keys and values are codes.

        Raises:
            ValueError: formats that this layout does not hold together.
        """


class Kept(NamedTuple):
    """The modules of a model whose weights stay as they are, by name."""

    linear: tuple[str, ...]
    embeddings: tuple[str, ...]
