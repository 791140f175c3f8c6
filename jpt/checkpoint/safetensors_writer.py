"""Writing safetensors files whose tensors are known beforehand and arrive in any order, whole or in rows."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jpt.checkpoint.dtypes import SAFETENSORS_CODES
from jpt.checkpoint.safetensors import TensorSpec


class SafetensorsWriter:
    """Writes one .safetensors file whose tensors are known beforehand; they may be filled in any order, in parts.

    The file appears under its name only when everything has been written (`close`, or leaving the `with` block without
    an exception); until then it lies beside it under a temporary name.

    Args:
        path: the file to write; an existing one is replaced at the end.
        specs: dtype and shape of every tensor. They are laid out by falling item size, so that all are aligned.
        metadata: strings for the header; transformers wants {'format': 'pt'}.
    """

    def __init__(
        self, path: str | os.PathLike[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        self.specs = dict(specs)
        self._temporary = self.path.with_name(f'.{self.path.name}.incomplete')
        order = sorted(self.specs, key=lambda name: -self.specs[name].dtype.itemsize)
        header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
        offset = 0
        starts: dict[str, int] = {}
        for name in order:
            spec = self.specs[name]
            header[name] = {
                'dtype': _code_of(self.path, name, spec.dtype),
                'shape': list(spec.shape),
                'data_offsets': [offset, offset + spec.nbytes],
            }
            starts[name] = offset
            offset += spec.nbytes
        raw = json.dumps(header, separators=(',', ':')).encode('utf-8')
        raw += b' ' * (-len(raw) % 8)
        self._starts = {name: 8 + len(raw) + start for name, start in starts.items()}
        self._missing = {name: spec.nbytes for name, spec in self.specs.items()}
        self._fd: int | None = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(self._fd, 8 + len(raw) + offset)
        _write_at(self._fd, len(raw).to_bytes(8, 'little') + raw, 0)

    def write(self, name: str, array: np.ndarray, first_row: int = 0) -> None:
        """Writes a tensor, or the rows of it that begin at `first_row` of its leading axis.

        Raises:
            ValueError: unknown name, another dtype than announced, or a shape that does not fit there.
        """
        spec = self.specs.get(name)
        if spec is None or self._fd is None:
            raise ValueError(f'{self.path}: tensor {name!r} was not announced, or the file is closed already')
        fits = array.shape == spec.shape
        if len(spec.shape) > 0 and array.ndim == len(spec.shape):
            rows = array.shape[0]
            fits = array.shape[1:] == spec.shape[1:] and first_row + rows <= spec.shape[0]
        if array.dtype != spec.dtype or not fits:
            raise ValueError(
                f'{self.path}: tensor {name!r} is announced as {spec.dtype} {list(spec.shape)}, '
                f'got {array.dtype} {list(array.shape)} at row {first_row}'
            )
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else 0
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        _write_at(self._fd, raw, self._starts[name] + first_row * row_bytes)
        self._missing[name] -= raw.nbytes

    def close(self) -> None:
        """Gives the finished file its name.

        Raises:
            ValueError: a tensor was not written, or not exactly once; the file does not appear.
        """
        if self._fd is None:
            return
        incomplete = [name for name, missing in self._missing.items() if missing]
        if incomplete:
            self.abort()
            raise ValueError(f'{self.path}: tensors not written exactly once: {", ".join(incomplete[:20])}')
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = None
        os.replace(self._temporary, self.path)

    def abort(self) -> None:
        """Removes what has been written so far."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._temporary.unlink()

    def __enter__(self) -> 'SafetensorsWriter':
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _code_of(path: Path, name: str, dtype: np.dtype) -> str:
    if dtype not in SAFETENSORS_CODES:
        allowed = ', '.join(str(known) for known in SAFETENSORS_CODES)
        raise ValueError(f'{path}: tensor {name!r}: dtype {dtype} has no safetensors code; expected one of {allowed}')
    return SAFETENSORS_CODES[dtype]


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:  # one call writes at most 2 GiB
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written


def save_file(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays as one safetensors file; `metadata` is a map of strings for the header."""
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
