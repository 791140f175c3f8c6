"""Recorded targets on disk: a folder with a manifest and parts, files of pieces that can be read one by one.

    manifest.json               which teacher, tokenizer, temperature, data; and, once all is there, every part
    train-00000.array_record    pieces of documents, one record each; the last record is the part's index
    eval-00000.array_record     likewise of held-out data

A part is written beside its place and renamed, so what has a name is complete. Where the next part goes on in the data
stands in its index: a run that was killed continues behind its last part.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
MANIFEST = 'manifest.json'
SUFFIX = '.array_record'
# A record is a piece that can be read alone; level 3 is within a percent of higher ones here, and several times faster.
WRITER_OPTIONS = 'group_size:1,zstd:3'
# Pieces are read one by one, in any order.
READER_OPTIONS = 'readahead_buffer_size:0'
# What begins a record: hash of the document's ids, hash of the piece's, its first position and how many, and how many
# tokens before the first the teacher saw.
HEAD = struct.Struct('<16s16sIII')
INDEX = np.dtype([('document', 'V16'), ('start', '<u4'), ('length', '<u4'), ('context', '<u4'), ('source', '<u4')])
INDEX = np.dtype([*INDEX.descr, ('place', '<u8'), ('record', '<u4')])


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was recorded, of what, by whom. `parts`: {split: parts in order}, None while the recording is under way."""

    teacher: dict[str, Any]  # path, family, fingerprint of config and weights, dtype of its computation
    tokenizer: str  # its fingerprint
    vocab_size: int
    temperature: float
    likely: int  # words of a position, at most
    top_p: float | None
    at_least: int
    dtype: str  # of log-probabilities, see ROUNDINGS
    relative_error: float  # of a log-probability, by rounding to dtype
    length: int  # positions of a piece, at most
    data: dict[str, Any]  # {split: fingerprint of the data}
    parts: dict[str, Any] | None = None

    def words(self) -> str:
        """How many words are kept, in words."""
        if self.top_p is None:
            return f'the {self.likely} likeliest words'
        return f'{self.at_least} to {self.likely} words that hold {self.top_p:g} of the mass'


def hash_of(ids: Any) -> bytes:
    """16 bytes of token ids: of a document, or of a piece with the word behind it."""
    return hashlib.sha256(np.asarray(ids).astype('<i4').tobytes()).digest()[:16]


def read_manifest(directory: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a folder of recorded targets; None where there is none.

    Raises:
        ValueError: damaged, or of another format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text('utf-8'))
        if content.pop('format') != FORMAT:
            raise ValueError(f'expected format {FORMAT}')
        return Manifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'{path}: cannot be read as the manifest of recorded targets: {error}') from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Puts a manifest in its place, in one step."""
    beside = directory / f'.{MANIFEST}.incomplete'
    beside.write_text(json.dumps({'format': FORMAT, **dataclasses.asdict(manifest)}, indent=1) + '\n', 'utf-8')
    beside.replace(directory / MANIFEST)


class Piece(NamedTuple):
    """A piece to be written: its place in the index, and its bytes."""

    document: bytes  # hash
    own: bytes  # hash of the piece
    start: int
    length: int
    context: int
    source: int  # which source of the data, and which record of it
    place: int
    data: bytes


class Part(NamedTuple):
    """The index of a part: a row of INDEX per piece, and what else the part says of itself."""

    path: Path
    rows: np.ndarray
    about: dict[str, Any]  # 'next': where the data goes on; 'sums': of what was counted


def part_path(directory: Path, split: str, number: int) -> Path:
    """Where a part lies."""
    return directory / f'{split}-{number:05d}{SUFFIX}'


def write_part(path: Path, pieces: Sequence[Piece], about: dict[str, Any]) -> None:
    """Writes a part; it is there as a whole or not at all. The same pieces give the same bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    rows = np.zeros(len(pieces), INDEX)
    beside = path.with_name(f'.{path.name}.incomplete')
    writer = ArrayRecordWriter(str(beside), WRITER_OPTIONS)
    for number, piece in enumerate(pieces):
        writer.write(HEAD.pack(piece.document, piece.own, piece.start, piece.length, piece.context) + piece.data)
        place = (piece.document, piece.start, piece.length, piece.context, piece.source, piece.place, number)
        rows[number] = place
    writer.write(json.dumps(about).encode() + b'\n' + rows.tobytes())
    writer.close()
    with beside.open('rb') as file:
        os.fsync(file.fileno())
    beside.replace(path)


def read_part(path: Path) -> Part:
    """The index of a part.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    reader = open_part(path)
    count = reader.num_records()
    try:
        about, _, rows = reader.read([count - 1])[0].partition(b'\n')
        index = np.frombuffer(rows, INDEX)
        if len(index) != count - 1:
            raise ValueError(f'an index of {len(index)} pieces')
        return Part(path, index, json.loads(about))
    except (ValueError, IndexError) as error:
        raise ValueError(f'{path} is damaged: {count} records, and the last is not their index ({error})') from error
    finally:
        reader.close()


def open_part(path: Path) -> Any:
    """A reader of the records of a part. Raises ValueError where there is no such file, or nothing in it."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        raise ValueError(f'{path}: this part of the recorded targets is not there')
    reader = ArrayRecordReader(str(path), READER_OPTIONS)
    if not reader.ok() or not reader.num_records():  # the library opens what is cut off without a word
        raise ValueError(f'{path} is damaged: it has no records')
    return reader


def read_parts(directory: Path, split: str) -> list[Part]:
    """The parts of a split, from the first to the last that is there."""
    parts: list[Part] = []
    while (path := part_path(directory, split, len(parts))).is_file():
        parts.append(read_part(path))
    return parts
