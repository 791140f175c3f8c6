"""Megatron's indexed datasets, `prefix.bin` and `prefix.idx`: tokens as raw bytes, and where each sequence lies.

The index (little endian): 9 bytes `MMIDIDX\\0\\0`; u64 version 1; u8 dtype code; u64 number of sequences; u64 number of
document bounds; then i32 lengths, i64 byte pointers into .bin, i64 document bounds (the sequence at which each document
starts, and the end). Multimodal modes that may follow are refused. Format: megatron/core/datasets/indexed_dataset.py.
"""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

MAGIC = b'MMIDIDX\x00\x00'
VERSION = 1
_HEAD = struct.Struct('<9sQBQQ')
# The codes of the format. Floats are part of it, tokens are not floats.
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class IndexedDataset:
    """The documents of a .bin/.idx pair, read by memory mapping: opening reads and checks the index, not the tokens.

    dataset[i] is document i as an array of the stored dtype: a view of the file where its sequences lie side by side.
    """

    def __init__(self, path: str | Path):
        """path: the prefix, or either file. Raises FileNotFoundError, or ValueError naming a file that is damaged."""
        self.prefix = prefix_of(path)
        self.idx_path, self.bin_path = Path(f'{self.prefix}.idx'), Path(f'{self.prefix}.bin')
        for file in (self.idx_path, self.bin_path):
            if not file.is_file():
                raise FileNotFoundError(f'{file}: an indexed dataset is a pair of files, {self.prefix}.bin and .idx')
        self.dtype, self.lengths, self._pointers, self._bounds = _read_index(self.idx_path)
        self._check()
        size = self.bin_path.stat().st_size
        self._tokens = np.memmap(self.bin_path, self.dtype, 'r', shape=(size // self.dtype.itemsize,)) if size else None

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document, read from the index alone."""
        total = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return total[self._bounds[1:]] - total[self._bounds[:-1]]

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f'document {i} of {self.prefix}, which has {len(self)}')
        first, last = self._bounds[i], self._bounds[i + 1]
        parts = [self._sequence(s) for s in range(first, last)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def _sequence(self, s: int) -> np.ndarray:
        if self._tokens is None or not self.lengths[s]:
            return np.zeros(0, self.dtype)
        start = int(self._pointers[s]) // self.dtype.itemsize
        return self._tokens[start : start + int(self.lengths[s])]

    def _check(self) -> None:
        size, item = self.bin_path.stat().st_size, self.dtype.itemsize
        ends = self._pointers + self.lengths.astype(np.int64) * item
        if len(ends) and int(ends.max()) > size:
            raise ValueError(
                f'{self.bin_path} is truncated: {size} bytes, but {self.idx_path} points up to {ends.max()}'
            )
        if (self.lengths < 0).any() or (self._pointers < 0).any() or (self._pointers % item).any():
            raise ValueError(f'{self.idx_path}: a length or pointer is negative, or not a multiple of {item} bytes')
        bounds = self._bounds
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self.lengths) or (np.diff(bounds) < 0).any():
            raise ValueError(
                f'{self.idx_path}: the document bounds must rise from 0 to the number of sequences, {len(self.lengths)}'
            )


class IndexedWriter:
    """Writes prefix.bin and prefix.idx, document by document; a context manager.

    The index is written when the block ends without an error, so a broken run leaves no readable pair.
    """

    def __init__(self, prefix: str | Path, vocab_size: int):
        """vocab_size decides the dtype: uint16 below 65,500 entries, else int32, as Megatron does."""
        self.prefix, self.vocab_size = prefix_of(prefix), vocab_size
        self.dtype = token_dtype(vocab_size)
        self._lengths: list[int] = []
        self._bounds = [0]
        self._bin: IO[bytes] | None = None

    def __enter__(self) -> 'IndexedWriter':
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        Path(f'{self.prefix}.idx').unlink(missing_ok=True)
        self._bin = Path(f'{self.prefix}.bin').open('wb')
        return self

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Appends a document of one sequence. Raises ValueError for an id outside of the vocabulary."""
        self.add_document([ids])

    def add_document(self, sequences: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Appends a document of several sequences (Megatron's sentence splitting makes such)."""
        if self._bin is None:
            raise ValueError(f'IndexedWriter({str(self.prefix)!r}): documents are added inside its `with` block')
        for ids in sequences:
            array = np.asarray(ids, np.int64)
            if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
                wrong = array[(array < 0) | (array >= self.vocab_size)][0]
                place = f'{self.prefix}.bin: document {len(self._bounds) - 1}'
                raise ValueError(f'{place}: id {wrong}, but vocab_size={self.vocab_size}')
            self._bin.write(array.astype(self.dtype).tobytes())
            self._lengths.append(len(array))
        self._bounds.append(len(self._lengths))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bin is not None:
            self._bin.close()
        if kind is None:
            lengths = np.array(self._lengths, '<i4')
            pointers = np.zeros(len(lengths), '<i8')
            np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
            pointers *= self.dtype.itemsize
            head = _HEAD.pack(MAGIC, VERSION, _CODES[self.dtype], len(lengths), len(self._bounds))
            arrays = lengths.tobytes() + pointers.tobytes() + np.array(self._bounds, '<i8').tobytes()
            Path(f'{self.prefix}.idx').write_bytes(head + arrays)


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where ids of a vocabulary fit by Megatron's rule (below 65,500), else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def prefix_of(path: str | Path) -> Path:
    """The path without .bin or .idx."""
    path = Path(path)
    return path.with_suffix('') if path.suffix in ('.bin', '.idx') else path


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    size = path.stat().st_size
    with path.open('rb') as file:
        head = file.read(_HEAD.size)
    if head[: len(MAGIC)] != MAGIC:
        raise ValueError(f'{path}: bad header: {head[:9]!r} where an index begins with {MAGIC!r}')
    if len(head) < _HEAD.size:
        raise ValueError(f'{path} is truncated: {size} bytes, its header alone has {_HEAD.size}')
    _, version, code, sequences, bounds = _HEAD.unpack(head)
    if version != VERSION:
        raise ValueError(f'{path}: bad version {version}: expected {VERSION}')
    if code not in _DTYPES or np.dtype(_DTYPES[code]).kind not in 'iu':
        raise ValueError(f'{path}: dtype code {code}: expected 1 (u8), 2 (i8), 3 (i16), 4 (i32), 5 (i64) or 8 (u16)')
    expected = _HEAD.size + 4 * sequences + 8 * sequences + 8 * bounds
    if size < expected:
        raise ValueError(f'{path} is truncated: {size} bytes, its header promises {expected}')
    if size > expected:
        kind = 'multimodal modes, which are not read here' if size == expected + sequences else 'unknown data'
        raise ValueError(f'{path}: {size - expected} bytes follow the index: {kind}')
    raw = np.memmap(path, np.uint8, 'r')
    first, second = _HEAD.size + 4 * sequences, _HEAD.size + 12 * sequences
    lengths = np.frombuffer(raw[_HEAD.size : first], '<i4')
    pointers, documents = np.frombuffer(raw[first:second], '<i8'), np.frombuffer(raw[second:], '<i8')
    return np.dtype(_DTYPES[code]).newbyteorder('<'), lengths, pointers, documents
