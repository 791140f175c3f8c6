"""Where documents come from: text files, JSON lines, parquet, indexed token files, and lists in memory.

A source gives record i at random, so that an epoch can be a permutation. A record is a text, a conversation
(OpenAI messages), or token ids. Plain files are memory-mapped; compressed ones and parquet are held in memory: a corpus
larger than that belongs into .bin/.idx.
"""

import abc
import bisect
import glob
import gzip
import hashlib
import json
import lzma
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpt.data.indexed import IndexedDataset
from jpt.data.records import Chat, DataError, Fields, Record, Routed, check_chat, make_record, record_keys

TEXT_SUFFIXES = ('.txt', '.md')
JSON_SUFFIXES = ('.jsonl', '.ndjson')
FIELDS = Fields()
COMPRESSED: dict[str, Callable[..., Any]] = {'.gz': gzip.open, '.xz': lzma.open}


class Source(abc.ABC):
    """A list of records; the same on every host."""

    name: str
    tokenized = False  # whether records are token ids already

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, i: int) -> Record:
        """Record i. Raises DataError where it is malformed."""

    @abc.abstractmethod
    def place(self, i: int) -> str:
        """File and line of record i, for messages."""

    @abc.abstractmethod
    def sizes(self, indices: np.ndarray) -> np.ndarray:
        """int64: about how many tokens each record has, without reading it; decides how many records a window takes."""

    def fingerprint(self) -> str:
        """Changes if the records do, as far as a cheap look shows."""
        ends = sorted({0, len(self) // 2, len(self) - 1}) if len(self) else []
        parts = [str(len(self)), str(int(self.sizes(np.arange(len(self))).sum()))]
        for i in ends:
            try:
                parts.append(repr(self[i]))
            except DataError as error:
                parts.append(error.reason)
        return hashlib.sha256('\0'.join(parts).encode('utf-8', 'surrogatepass')).hexdigest()[:16]


class MemorySource(Source):
    """Records that are already here: texts, or conversations as `Chat`; with a route as `Routed`."""

    def __init__(self, records: Sequence[Record], name: str = 'memory'):
        self.name, self._records = name, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        record = self._records[i]
        chat = record.record if isinstance(record, Routed) else record
        if isinstance(chat, Chat):
            check_chat(chat.messages, self.place(i))
        return record

    def place(self, i: int) -> str:
        return f'{self.name}[{i}]'

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([_size(self._records[i]) for i in indices], np.int64)


class TextSource(Source):
    """A plain text file; `separator` cuts it into documents, without one the file is one document."""

    def __init__(self, path: str | Path, separator: str = ''):
        self.name, self._separator = str(path), separator
        self._data = _open_bytes(Path(path))
        bounds = _cut(self._data, separator.encode()) if separator else [(0, len(self._data))]
        self._bounds = [(a, b) for a, b in bounds if self._data[a:b].strip()]  # a separator at either end leaves blanks

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, i: int) -> str:
        start, end = self._bounds[i]
        text = _decode(self._data[start:end], self.place(i))
        return text.strip('\n') if self._separator else text

    def place(self, i: int) -> str:
        return f'{self.name}: byte {self._bounds[i][0]}'

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([_guess_tokens(self._bounds[i][1] - self._bounds[i][0]) for i in indices], np.int64)


class JsonlSource(Source):
    """JSON lines; blank lines are no records."""

    def __init__(self, path: str | Path, fields: Fields = FIELDS, chat: bool = False):
        self.name, self._fields, self._chat = str(path), fields, chat
        self._data = _open_bytes(Path(path))
        ends = np.append(_line_ends(self._data), len(self._data))
        starts = np.concatenate([[0], ends[:-1] + 1])
        short = np.flatnonzero(ends - starts < 16)  # a longer line of white space is reported as malformed
        blank = [k for k in short if not self._data[starts[k] : ends[k]].strip()]
        self._lines = np.delete(np.arange(len(starts)), blank)
        self._starts, self._ends = starts[self._lines], ends[self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Record:
        text = _decode(self._data[self._starts[i] : self._ends[i]], self.place(i))
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(self.place(i), f'not JSON: {error}') from error
        return make_record(row, self._fields, self._chat, self.place(i))

    def place(self, i: int) -> str:
        return f'{self.name}:{self._lines[i] + 1}'

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return _guess_tokens(self._ends[indices] - self._starts[indices])


class ParquetSource(Source):
    """A parquet file, held in memory as Arrow; needs the pyarrow package."""

    def __init__(self, path: str | Path, fields: Fields = FIELDS, chat: bool = False):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"{path}: parquet files need pyarrow: pip install 'jpt[parquet]'") from error
        self.name, self._fields, self._chat = str(path), fields, chat
        columns = pyarrow.parquet.read_schema(path).names
        needed = (*record_keys(fields, chat), *([fields.route] if fields.route else []))
        wanted = [name for name in (*needed, 'tools') if name in columns]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ValueError(f'{path} has no column {missing[0]!r}: its columns are {", ".join(columns)}')
        self._table = pyarrow.parquet.read_table(path, columns=wanted).combine_chunks()
        self._size = _guess_tokens(self._table.nbytes // max(self._table.num_rows, 1))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> Record:
        row = {name: self._table.column(name)[i].as_py() for name in self._table.column_names}
        return make_record(_without_nulls(row), self._fields, self._chat, self.place(i))

    def place(self, i: int) -> str:
        return f'{self.name}: row {i}'

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self._size, np.int64)


class IndexedSource(Source):
    """A Megatron .bin/.idx pair: documents that are tokens already; only the rows of this host are ever read."""

    def __init__(self, path: str | Path):
        self._data, self.tokenized = IndexedDataset(path), True
        self.name = str(self._data.bin_path)
        self._lengths = self._data.document_lengths()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._data[i]

    def place(self, i: int) -> str:
        return f'{self.name}: document {i}'

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return self._lengths[indices]


class Concatenated(Source):
    """Several sources as one, one after another."""

    def __init__(self, parts: Sequence[Source], name: str):
        self.name, self._parts = name, list(parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self.tokenized = any(part.tokenized for part in parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Record:
        part, index = self._find(i)
        return self._parts[part][index]

    def place(self, i: int) -> str:
        part, index = self._find(i)
        return self._parts[part].place(index)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        part = np.searchsorted(self._ends, indices, side='right')
        sizes = np.zeros(len(indices), np.int64)
        for p in np.unique(part):
            where = part == p
            sizes[where] = self._parts[p].sizes(indices[where] - (self._ends[p] - len(self._parts[p])))
        return sizes

    def _find(self, i: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._ends, i)
        return part, i - (self._ends[part] - len(self._parts[part]))


def open_source(path: str, fields: Fields = FIELDS, chat: bool = False, separator: str = '') -> Source:
    """The source at a path: a file, a glob pattern (its files sorted by name), or stdlib:train, stdlib:held_out.

    chat: whether records are conversations. separator: cuts plain text files into documents.
    Raises FileNotFoundError for a path that names nothing, ValueError for a kind of file that is not read, or that
    lacks what `fields` name.
    """
    parts = [_open(name, fields, chat, separator) for name in _expand(path)]
    return parts[0] if len(parts) == 1 else Concatenated(parts, path)


def _open(name: str, fields: Fields, chat: bool, separator: str) -> Source:
    if name.startswith('stdlib:'):
        from jpt.data.stdlib_corpus import load_stdlib

        _check_route(name, fields, 'this corpus')
        return MemorySource(load_stdlib(name.removeprefix('stdlib:')), name)
    suffixes = [s for s in Path(name).suffixes if s not in COMPRESSED]
    suffix = suffixes[-1] if suffixes else ''
    makers: dict[tuple[str, ...], Callable[[], Source]] = {
        JSON_SUFFIXES: lambda: JsonlSource(name, fields, chat),
        TEXT_SUFFIXES: lambda: TextSource(name, separator),
        ('.parquet',): lambda: ParquetSource(name, fields, chat),
        ('.bin', '.idx'): lambda: IndexedSource(name),
    }
    for known, make in makers.items():
        if suffix in known:
            if chat and known in (TEXT_SUFFIXES, ('.bin', '.idx')):
                raise ValueError(f'{name}: conversations come from JSON lines or parquet, not from {suffix} files')
            if known in (TEXT_SUFFIXES, ('.bin', '.idx')):
                _check_route(name, fields, f'{suffix} files')
            return make()
    allowed = ', '.join(s for known in makers for s in known)
    raise ValueError(
        f'{name}: unknown kind of file {suffix!r}: expected {allowed}, or text and JSON lines in .gz or .xz'
    )


def _check_route(name: str, fields: Fields, kind: str) -> None:
    if fields.route:
        raise ValueError(
            f'{name}: DataConfig.route_key={fields.route!r} is a field of JSON lines or of parquet: {kind} have none'
        )


def _expand(path: str) -> list[str]:
    if path.startswith('stdlib:') or Path(path).exists():
        return [path]
    if Path(f'{path}.idx').is_file():
        return [f'{path}.idx']
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise FileNotFoundError(f'data.paths: {path!r} is no file, no prefix of .bin/.idx, and no pattern that matches')
    return found


def _open_bytes(path: Path) -> Any:
    """The content as bytes, or as a memory map that slices like bytes."""
    if path.suffix in COMPRESSED:
        try:
            with COMPRESSED[path.suffix](path, 'rb') as file:
                return file.read()
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ValueError(f'{path} cannot be decompressed: {error}') from error
    with path.open('rb') as file:
        if not path.stat().st_size:
            return b''
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_ends(data: Any) -> np.ndarray:
    array = np.frombuffer(data, np.uint8) if len(data) else np.zeros(0, np.uint8)
    step = 1 << 26  # in parts, as the comparison takes as many bytes as it looks at
    found = [np.flatnonzero(array[i : i + step] == ord('\n')) + i for i in range(0, len(array), step)]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _cut(data: Any, mark: bytes) -> list[tuple[int, int]]:
    bounds, start = [], 0
    while (found := data.find(mark, start)) >= 0:
        bounds.append((start, found))
        start = found + len(mark)
    return [*bounds, (start, len(data))]


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode('utf-8')
    except UnicodeDecodeError as error:
        raise DataError(place, f'not UTF-8: {error}') from error


def _size(record: Record) -> int:
    if isinstance(record, Routed):
        record = record.record
    if isinstance(record, np.ndarray):
        return len(record)
    return _guess_tokens(len(record if isinstance(record, str) else str(record.messages)))


def _guess_tokens(size: Any) -> Any:
    return size // 4 + 1  # bytes per token of common tokenizers; only the size of windows depends on it


def _without_nulls(value: Any) -> Any:
    # Arrow gives every row all keys that any row has.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == 'content'}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
