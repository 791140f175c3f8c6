"""The grain iterators: windows of the global order, and batches of their rows.

A state is a small JSON value that is the same on every host: where the current window begins, and which row is next.
"""

from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from jpt.data.alignment import Reading, SecondReader, TeacherTokens
from jpt.data.batch import Batch, pack_rows
from jpt.data.packing import Piece, Row
from jpt.data.recorded import RecordedTargets
from jpt.data.records import DataError
from jpt.data.windows import COUNTS, Window, WindowReader
from jpt.kernels.sparse_target import SparseTarget

_TOTALS = ('batches', 'rows', 'documents', 'tokens', *COUNTS)


class Windows(grain.IterDataset):
    """All windows of `epochs` passes over the order; endless if None."""

    def __init__(self, reader: WindowReader, epochs: int | None):
        super().__init__()
        self.reader, self.epochs = reader, epochs

    def __iter__(self) -> 'WindowIterator':
        return WindowIterator(self.reader, self.epochs)


class WindowIterator(grain.DatasetIterator):
    """State: {'position', 'taken'} of the next window."""

    def __init__(self, reader: WindowReader, epochs: int | None):
        super().__init__()
        self._reader = reader
        self._end = None if epochs is None else epochs * reader.order.epoch_length
        self._position, self._taken = 0, [0] * len(reader.sources)

    def __next__(self) -> Window:
        if self._end is not None and self._position >= self._end:
            raise StopIteration
        window = self._reader.read(self._position, self._taken)
        self._position, self._taken = window.end, window.taken
        return window

    def get_state(self) -> dict[str, Any]:
        """Where the batches stand, as JSON values: equal on all hosts."""
        return {'position': self._position, 'taken': list(self._taken)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a state of `get_state` stood.

        Raises:
            ValueError: the state is of other data, by the setting that differs.
        """
        self._position, self._taken = int(state['position']), [int(count) for count in state['taken']]


def ahead(dataset: grain.IterDataset, count: int) -> grain.IterDataset:
    """The same elements, `count` of them made in a background thread before they are asked for."""
    return ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=count) if count else dataset


class Batches(grain.IterDataset):
    """Batches of batch_size rows, of which each host makes its own share; the last one is filled with empty rows."""

    def __init__(
        self,
        reader: WindowReader,
        epochs: int | None,
        batch_size: int,
        local: slice,
        prefetch: int,
        targets: RecordedTargets | None = None,
    ):
        """local: which of the batch_size rows this host makes. targets: what stands beside each row of tokens."""
        super().__init__(ahead(Windows(reader, epochs), min(prefetch, 1)))
        self._reader, self._batch_size, self._local, self._targets = reader, batch_size, local, targets

    def __iter__(self) -> 'BatchIterator':
        return BatchIterator(self._parent.__iter__(), self._reader, self._batch_size, self._local, self._targets)


class BatchIterator(grain.DatasetIterator):
    """State: the state of the windows, the row in the current one, totals, and a fingerprint of the data."""

    def __init__(
        self,
        windows: grain.DatasetIterator,
        reader: WindowReader,
        batch_size: int,
        local: slice,
        targets: RecordedTargets | None,
    ):
        super().__init__(windows)
        self._reader, self._batch_size, self._local, self._targets = reader, batch_size, local, targets
        self._fingerprint = reader.fingerprint() | ({'targets': targets.fingerprint()} if targets else {})
        self._totals = dict.fromkeys(_TOTALS, 0)
        self._window: Window | None = None
        self._window_state = windows.get_state()
        self._row = 0

    def __next__(self) -> Batch:
        rows: list[tuple[Window, Row]] = []
        while len(rows) < self._batch_size and (window := self._current()):
            take = window.rows[self._row : self._row + self._batch_size - len(rows)]
            rows += [(window, row) for row in take]
            self._row += len(take)
        if not rows:
            raise StopIteration
        for _, row in rows:
            self._totals['tokens'] += sum(piece.length for piece in row)
            self._totals['documents'] += sum(piece.start == 0 for piece in row)
        self._totals['rows'] += len(rows)
        self._totals['batches'] += 1
        return self._make(rows[self._local])

    def get_state(self) -> dict[str, Any]:
        """The place in the data, as JSON values: the next row and its window, the counts, and which data it is."""
        used_up = self._window is None or self._row >= len(self._window.rows)
        return {
            'windows': self._parent.get_state() if used_up else self._window_state,
            'row': 0 if used_up else self._row,
            'totals': dict(self._totals),
            'data': self._fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave.

        Raises:
            ValueError: the place is one in other data.
        """
        for name in sorted({*self._fingerprint, *state['data']}):
            saved, ours = state['data'].get(name), self._fingerprint.get(name)
            if saved != ours:
                raise ValueError(
                    f'the data state was saved with {name}={saved!r}, but this run has {name}={ours!r}: '
                    'the batches after it would not be the ones that follow'
                )
        self._parent.set_state(state['windows'])
        self._window, self._window_state = None, state['windows']
        self._row = int(state['row'])
        self._totals = {name: int(state['totals'][name]) for name in _TOTALS}
        if self._row:  # the counts of this window are in the totals already
            self._window = next(self._parent)

    def _current(self) -> Window | None:
        """The window that has the next row, or None at the end."""
        without = 0
        while self._window is None or self._row >= len(self._window.rows):
            self._window_state, self._row = self._parent.get_state(), 0
            try:
                self._window = next(self._parent)
            except StopIteration:
                self._window = None
                return None
            for name in COUNTS:
                self._totals[name] += self._window.counts[name]
            without = 0 if self._window.rows else without + len(self._window.documents) + self._window.counts['skipped']
            if without >= self._reader.order.epoch_length:
                counts = ', '.join(f'{n} {name}' for name, n in self._totals.items() if n and name in COUNTS)
                raise DataError('data', f'a whole epoch gave no row: {counts}')
        return self._window

    def _make(self, rows: list[tuple[Window, Row]]) -> Batch:
        parts = []
        for window, row in rows:
            spans = [(window.documents[p.document], slice(p.start, p.start + p.length + 1)) for p in row]
            parts.append([(document.ids[span], document.loss[span]) for document, span in spans])
        size = len(range(*self._local.indices(self._batch_size)))
        tokenizer = self._reader.tokenizer
        pad = next(i for i in (tokenizer.pad_id, tokenizer.eos_id, 0) if i is not None)
        batch = pack_rows(parts, self._reader.seq_len, pad, size)
        for array in (batch.tokens, batch.targets):
            if array.size and not 0 <= array.min() <= array.max() < tokenizer.vocab_size:
                self._refuse(rows)
        if self._reader.config.route_key:
            batch = batch._replace(route=_routes(rows, batch.segment_ids))
        if self._targets is not None:
            batch = batch._replace(sparse_target=self._recorded(rows, size))
        if self._reader.second is not None:
            batch = batch._replace(teacher=self._read_again(self._reader.second, rows, size))
        return batch

    def _read_again(self, second: SecondReader, rows: list[tuple[Window, Row]], size: int) -> TeacherTokens:
        """What a teacher with another tokenizer reads beside packed rows, and beside empty ones behind them."""

        def reading(window: Window, piece: Piece) -> Reading:
            found = window.documents[piece.document].reading
            assert found is not None
            return found

        found = [
            second.row([(reading(window, piece), piece.start, piece.length) for piece in row], self._reader.seq_len)
            for window, row in rows
        ]
        found += [second.empty((), self._reader.seq_len)] * (size - len(rows))
        return TeacherTokens(*(np.stack(column) for column in zip(*found, strict=True)))

    def _recorded(self, rows: list[tuple[Window, Row]], size: int) -> SparseTarget:
        """Targets [size, T, J] of packed rows, and of empty rows behind them."""
        assert self._targets is not None
        found = [
            self._targets.of_row([self._named(window, piece) for piece in row], self._reader.seq_len)
            for window, row in rows
        ]
        found += [self._targets.empty((self._reader.seq_len,))] * (size - len(rows))
        return SparseTarget(*(np.stack(column) for column in zip(*found, strict=True)))

    def _named(self, window: Window, piece: Piece) -> tuple[Any, Piece, str]:
        source, index = window.places[piece.document]
        return window.documents[piece.document].ids, piece, self._reader.sources[source].place(index)

    def _refuse(self, rows: list[tuple[Window, Row]]) -> None:
        size = self._reader.tokenizer.vocab_size
        for window, row in rows:
            for piece in row:
                ids = np.asarray(window.documents[piece.document].ids, np.int64)
                wrong = ids[(ids < 0) | (ids >= size)]
                if len(wrong):
                    source, index = window.places[piece.document]
                    place = self._reader.sources[source].place(index)
                    raise DataError(place, f'token id {wrong[0]}, but the vocabulary of the tokenizer has {size}')


def _routes(rows: list[tuple[Window, Row]], segment_ids: np.ndarray) -> np.ndarray:
    """The number of every position's teacher, int32 [B, T], from the segments of packed rows; 0 in padding."""
    route = np.zeros_like(segment_ids)
    for b, (window, row) in enumerate(rows):
        of_segment = np.array([0, *(window.routes[piece.document] for piece in row)], route.dtype)
        route[b] = of_segment[segment_ids[b]]
    return route
