"""The safetensors format, read by memory map: 8 bytes of header length, a JSON header, raw tensors.

An own reader, because the safetensors package has no FP8 for numpy or JAX, and because conversion and sharded loading
need parts of tensors. Format: https://github.com/huggingface/safetensors, "Format".
"""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpt.checkpoint.dtypes import SAFETENSORS_DTYPES

MAX_HEADER_BYTES = 100_000_000
Index = tuple[slice | int, ...]


class TensorSpec(NamedTuple):
    """What a tensor is, without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class _Entry(NamedTuple):
    spec: TensorSpec
    start: int  # offset in the file
    end: int


class SafetensorsFile:
    """One open .safetensors file; tensors are views of the file's memory map until they are copied.

    Attributes:
        tensors: the spec of every tensor by name, in the order of the header.
        metadata: the strings under `__metadata__`.

    Raises:
        ValueError: the file is not valid safetensors; the message names the file, and the tensor where one is at fault.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < 8:
            raise ValueError(f'{self.path}: {size} bytes are too few for a safetensors file; it is truncated or empty')
        with self.path.open('rb') as file:
            length = int.from_bytes(file.read(8), 'little')
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(
                    f'{self.path}: header length {length} exceeds what a file of {size} bytes can hold '
                    f'(at most {MAX_HEADER_BYTES}); it is truncated or not safetensors'
                )
            header = _parse_header(self.path, file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, str] = header.pop('__metadata__', {})
        self._entries = _check_entries(self.path, header, 8 + length, size)
        self.tensors = {name: entry.spec for name, entry in self._entries.items()}

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the memory map; nothing is read until it is used."""
        if name not in self._entries:
            raise KeyError(f'{self.path}: no tensor {name!r}')
        spec, start, _ = self._entries[name]
        return np.ndarray(spec.shape, spec.dtype, buffer=self._map, offset=start)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A copy of the tensor, or of the part that `index` selects; only that part is read from disk."""
        array = np.array(self.view(name)[index])
        self.release(name)
        return array

    def release(self, name: str) -> None:
        """Lets the operating system drop the tensor's pages, so that reading a large file does not fill memory."""
        _, start, end = self._entries[name]
        first = start - start % mmap.PAGESIZE
        if end > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ValueError(f'{path}: the header names {", ".join(map(repr, repeated))} more than once')
        return dict(pairs)

    try:
        header = json.loads(raw.decode('utf-8'), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path}: the header is not JSON ({error}); it is damaged or not safetensors') from error
    if not isinstance(header, dict):
        raise ValueError(f'{path}: the header is a JSON {type(header).__name__}, expected an object')
    metadata = header.get('__metadata__', {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f'{path}: __metadata__ must map strings to strings')
    return header


def _check_entries(path: Path, header: Mapping[str, Any], base: int, size: int) -> dict[str, _Entry]:
    entries = {name: _parse_entry(path, name, fields, base) for name, fields in header.items()}
    expected = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise ValueError(f'{path}: tensor {name!r} ends at byte {entry.end} of {size}; the file is truncated')
        if entry.start != expected:
            raise ValueError(
                f'{path}: tensor {name!r} starts at byte {entry.start}, expected {expected}: '
                'tensors must follow each other without gap or overlap'
            )
        expected = entry.end
    if expected != size:
        raise ValueError(f'{path}: {size - expected} bytes follow the last tensor; expected none')
    return entries


def _parse_entry(path: Path, name: str, fields: Any, base: int) -> _Entry:
    where = f'{path}: tensor {name!r}'
    if not isinstance(fields, dict) or set(fields) != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'{where}: expected exactly the fields dtype, shape and data_offsets')
    code, shape, offsets = fields['dtype'], fields['shape'], fields['data_offsets']
    if code not in SAFETENSORS_DTYPES:
        raise ValueError(f'{where}: dtype {code!r}: expected one of {", ".join(SAFETENSORS_DTYPES)}')
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f'{where}: shape {shape} and data_offsets {offsets} must be lists of integers, none negative')
    spec = TensorSpec(SAFETENSORS_DTYPES[code], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise ValueError(
            f'{where}: data_offsets {offsets} span {offsets[1] - offsets[0]} bytes, '
            f'but {code} {list(shape)} takes {spec.nbytes}'
        )
    return _Entry(spec, base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def load_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, copied into memory."""
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}
