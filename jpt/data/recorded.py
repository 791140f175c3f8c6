"""What a teacher said of a data set, found again by the content of a document, in whatever order and rows it comes.

A document is found by a hash of its token ids; a row's part of it may lie anywhere in the recorded pieces. The teacher
of a recorded piece saw the piece from its first position on. Where a row shows the student another left context, the
teacher answered another question, and that is an error; targets that saw more can be accepted.
"""

import collections
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpt.data.packing import Piece
from jpt.data.records import DataError
from jpt.data.target_codec import ROUNDINGS, PieceTargets, decode_targets
from jpt.data.target_store import HEAD, MANIFEST, Manifest, hash_of, open_part, read_manifest, read_part
from jpt.kernels.sparse_target import SparseTarget, no_words

_OPEN_PARTS = 64  # at a time
_HASHES = 1024  # of documents whose pieces are being asked for


class Found(NamedTuple):
    """Positions first .. last of a document, as they lie in a recorded piece (a row of the index, with its part)."""

    first: int
    last: int
    row: Any
    part: int


class RecordedTargets:
    """A folder that jpt.distill.record wrote, open for reading; several threads may ask."""

    def __init__(self, directory: str | os.PathLike[str], *, more_context: bool = False):
        """more_context: accept targets whose teacher saw more of a document to the left than the student does.

        Raises FileNotFoundError where nothing was recorded, ValueError where it is not complete or damaged.
        """
        self.directory, self._more_context = Path(directory), more_context
        self.manifest = open_manifest(directory)
        self._paths = [self.directory / part['file'] for parts in self._splits().values() for part in parts['parts']]
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._hashes: collections.OrderedDict[int, tuple[Any, bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()
        rows = [read_part(path).rows for path in self._paths]
        self._part = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        self._rows = np.concatenate(rows)
        halves = _halves(self._rows['document'])
        order = np.lexsort((self._rows['start'], halves[1], halves[0]))
        self._part, self._rows, self._halves = self._part[order], self._rows[order], halves[:, order]

    def _splits(self) -> dict[str, Any]:
        assert self.manifest.parts is not None
        return self.manifest.parts

    @property
    def dtype(self) -> np.dtype:
        """Of the log-probabilities that training reads."""
        return ROUNDINGS[self.manifest.dtype].read

    def empty(self, shape: tuple[int, ...]) -> SparseTarget:
        """Targets [..., J] of no word at all, as padding has them."""
        return no_words(shape, self.manifest.likely, self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """What a place in the data remembers of the targets that were read with it."""
        about = self.manifest
        return {'teacher': about.teacher['fingerprint'], 'likely': about.likely, 'dtype': about.dtype}

    def of_row(self, documents: Sequence[tuple[Any, Piece, str]], length: int) -> SparseTarget:
        """Targets [length, J] of a row: of each part of a document, as (token ids, Piece, name of the document).

        Raises:
            DataError: naming the document, where what was recorded is of another text or saw another left context.
        """
        row, at = self.empty((length,)), 0
        for ids, piece, place in documents:
            target = self.of_piece(ids, piece.start, piece.length, place).target
            for whole, part in zip(row, target, strict=True):
                whole[at : at + piece.length] = part
            at += piece.length
        return row

    def of_piece(self, ids: Any, start: int, length: int, place: str) -> PieceTargets:
        """What was recorded of positions start .. start + length of a document, seen from `start` on.

        ids: of the whole document. place: its name, for messages.

        Raises:
            DataError: as `of_row`.
        """
        parts = [self._read(ids, found, place) for found in self._cover(ids, start, length, place)]
        if len(parts) == 1:
            return parts[0]
        columns = (np.concatenate(column) for column in zip(*(p.target for p in parts), strict=True))
        return PieceTargets(SparseTarget(*columns), np.concatenate([p.sampled_logp for p in parts]))

    def _cover(self, ids: Any, start: int, length: int, place: str) -> Iterator[Found]:
        """The recorded pieces that hold these positions, from left to right."""
        rows, parts = self._of_document(ids, place)
        at, end = start, start + length
        while at < end:
            inside = np.flatnonzero((rows['start'] <= at) & (at < rows['start'] + rows['length']))
            if not len(inside):
                last = int((rows['start'] + rows['length']).max())
                raise DataError(
                    place,
                    f'no targets in {self.directory} for its positions from {at} on: '
                    f'the teacher read {last} of them; record again without cutting the document short',
                )
            row, part = rows[inside[0]], int(parts[inside[0]])
            seen_from = int(row['start']) - int(row['context'])
            if seen_from != start:
                self._check_context(place, (start, end), at, seen_from)
            stop = min(end, int(row['start']) + int(row['length']))
            yield Found(at, stop, row, part)
            at = stop

    def _check_context(self, place: str, asked: tuple[int, int], at: int, seen_from: int) -> None:
        start, end = asked
        here = (
            f'positions {start} to {end} are trained on alone, but for position {at} the teacher in {self.directory} '
            f'read the document from {seen_from} on'
        )
        again = (
            f'Rows are cut where the record is with config.data.packing best_fit, least_fill=0 and '
            f'config.batch.length={self.manifest.length}'
        )
        if seen_from > start:
            raise DataError(
                place,
                f'{here}: less than the student sees. {again}; or record again with a config.batch.length of at least '
                f'{end}, so that no piece ends within these',
            )
        if not self._more_context:
            raise DataError(
                place,
                f'{here}: more than the student sees. {again}; config.distill.more_context=True takes such targets',
            )

    def _of_document(self, ids: Any, place: str) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the index that are of this document, with their parts."""
        begin, rest = _halves(np.array([self._hash(ids)], 'V16'))[:, 0]
        first, last = (int(np.searchsorted(self._halves[0], begin, side)) for side in ('left', 'right'))
        same = first + np.flatnonzero(self._halves[1, first:last] == rest)
        if not len(same):
            raise DataError(
                place,
                f'no targets in {self.directory} for a document of these {len(ids)} tokens: what was recorded is of '
                'another text, or was tokenized in another way (config.data: add_bos, add_eos, chat template); record '
                'the data again, or train on the data that was recorded',
            )
        return self._rows[same], self._part[same]

    def _hash(self, ids: Any) -> bytes:
        with self._lock:
            known = self._hashes.get(id(ids))
            if known is None or known[0] is not ids:
                known = (ids, hash_of(ids))
                self._hashes[id(ids)] = known
                if len(self._hashes) > _HASHES:
                    self._hashes.popitem(last=False)
        return known[1]

    def _read(self, ids: Any, found: Found, place: str) -> PieceTargets:
        """The found positions, after a look at whether the piece is what the index says, and of these ids."""
        row, path = found.row, self._paths[found.part]
        with self._lock:
            data = self._reader(found.part).read([int(row['record'])])[0]
        document, own, *numbers = HEAD.unpack_from(data)
        begin = int(row['start'])
        ids_here = ids[begin : begin + int(row['length']) + 1]
        expected = [int(row[name]) for name in ('start', 'length', 'context')]
        if document != row['document'].tobytes() or numbers != expected or own != hash_of(ids_here):
            raise DataError(place, f'{path}: record {row["record"]} is not the piece that the index promises: damaged')
        piece = decode_targets(data[HEAD.size :], self.manifest.dtype)
        span = slice(found.first - begin, found.last - begin)
        target = SparseTarget(*(part[span] for part in piece.target))
        return PieceTargets(target, piece.sampled_logp[span])

    def _reader(self, part: int) -> Any:
        reader = self._readers.pop(part, None) or open_part(self._paths[part])
        self._readers[part] = reader
        if len(self._readers) > _OPEN_PARTS:
            self._readers.popitem(last=False)[1].close()
        return reader


def open_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of finished recorded targets.

    Raises:
        FileNotFoundError: nothing was recorded there. ValueError: damaged, or the recording has not come to its end.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise FileNotFoundError(f'{directory}: no {MANIFEST}: jpt.distill.record makes it')
    if manifest.parts is None:
        raise ValueError(f'{directory}: the recording is not complete: the command that began it goes on from there')
    return manifest


def _halves(documents: np.ndarray) -> np.ndarray:
    """Hashes [n] of 16 bytes as two numbers each, [2, n], to search among."""
    return np.frombuffer(np.ascontiguousarray(documents).tobytes(), '<u8').reshape(-1, 2).T.copy()
