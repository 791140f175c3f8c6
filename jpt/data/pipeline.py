"""From files to batches: make_pipeline gives an iterator whose place can be saved and gone back to, bit for bit.

The global batches are the same under any number of hosts, and so is the state: a run of four hosts resumes on one.
Hosts that hold the same rows (tensor or pipeline parallel across hosts) share one process_index.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jpt.data.batch import Batch
from jpt.data.config import DataConfig
from jpt.data.sources import Source, open_source
from jpt.data.tokenizer import Tokenizer
from jpt.data.windows import COUNTS, WindowReader

if TYPE_CHECKING:
    import grain

    from jpt.data.alignment import SecondReader
    from jpt.data.recorded import RecordedTargets

__all__ = ['Batch', 'DataConfig', 'Pipeline', 'make_pipeline']


class Pipeline:
    """An iterator of numpy Batches (the rows of this host) with a state.

    `iterator` is a grain.DatasetIterator over the same batches, for grain.checkpoint.CheckpointSave(iterator). Saving
    get_state() as JSON does the same and does not depend on the number of hosts.
    """

    def __init__(self, iterator: 'grain.DatasetIterator', reader: WindowReader):
        self._reader = reader
        self._held = [iterator]
        # At exit too: grain's iterators must be gone before the interpreter takes their modules apart.
        self._closing = weakref.finalize(self, _let_go, self._held)

    @property
    def iterator(self) -> 'grain.DatasetIterator':
        """The grain iterator. Raises ValueError after close()."""
        if not self._held:
            raise ValueError('this Pipeline is closed')
        return self._held[0]

    def __iter__(self) -> 'Pipeline':
        return self

    def __next__(self) -> Batch:
        return next(self.iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch comes from: a JSON value, the same on every host."""
        return self.iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Raises ValueError, naming what differs, where the state is that of other data."""
        self.iterator.set_state(state)

    def progress(self) -> dict[str, int | float]:
        """What was given so far, on all hosts together.

        epoch: passes begun before this one. batches, rows, documents, tokens: given (tokens without padding). skipped,
        empty, split, truncated, dropped: documents, up to the end of the current window. fill: the share of positions
        that hold a token, without the empty rows that may end the last batch.
        """
        state = self.get_state()
        totals: dict[str, int] = state['totals']
        rows = totals['rows']
        position = state['windows']['position']
        return {
            'epoch': position // self._reader.order.epoch_length,
            **totals,
            'fill': totals['tokens'] / (rows * self._reader.seq_len) if rows else 1.0,
        }

    def describe(self) -> str:
        """The same as a line for people: what was read, how full the rows are, and what happened to documents."""
        found = self.progress()
        parts = [f'{found["documents"]:,} documents in {found["rows"]:,} rows, {found["fill"]:.1%} full']
        parts += [f'{found[name]:,} {name}' for name in COUNTS if found[name]]
        return f'{", ".join(parts)}; passes finished: {found["epoch"]}'

    def close(self) -> None:
        """Ends the background threads; the iterator cannot be used after."""
        self._closing()


def _let_go(held: 'list[grain.DatasetIterator]') -> None:
    held.pop().close()


def make_pipeline(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
    evaluate: bool = False,
    sources: Sequence[Source] | None = None,
    targets: 'RecordedTargets | None' = None,
    second: 'SecondReader | None' = None,
    routes: Sequence[str] = (),
) -> Pipeline:
    """An iterator of Batch [batch_size / process_count, seq_len].

    batch_size: rows of the global batch; this host makes the process_index-th share of them.
    num_epochs: passes over the data, the last batch filled with empty rows; None means without end.
    evaluate: one pass in the order of the files, without weights; every host gets the same number of batches.
    sources: what to read instead of config.paths, such as MemorySource(texts).
    targets: what a teacher said of these documents; batches then have it as sparse_target.
    second: reads the texts with a teacher's tokenizer too; batches then have its tokens as teacher.
    routes: the names that config.route_key may find in a record; batches then have their numbers as route.
    Raises ValueError naming the argument, and what the parts raise: DataError, FileNotFoundError.
    """
    for name, value in (('batch_size', batch_size), ('seq_len', seq_len), ('process_count', process_count)):
        if value < 1:
            raise ValueError(f'make_pipeline: {name}={value}: expected at least 1')
    if batch_size % process_count:
        raise ValueError(f'make_pipeline: batch_size={batch_size} does not divide by process_count={process_count}')
    if not 0 <= process_index < process_count:
        raise ValueError(f'make_pipeline: process_index={process_index}: expected 0..{process_count - 1}')
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f'make_pipeline: num_epochs={num_epochs}: expected at least 1, or None for no end')
    if sources is not None and config.paths:
        raise ValueError(f'make_pipeline: sources are given, and DataConfig.paths={config.paths!r} too; expected one')
    from jpt.data.iterator import Batches, ahead  # grain takes a second to import

    if sources is None:
        sources = [open_source(path, config.fields, config.is_chat, config.separator) for path in config.paths]
    if evaluate:
        num_epochs = 1
    reader = WindowReader(
        config, tokenizer, sources, seq_len=seq_len, seed=seed, evaluate=evaluate, second=second, routes=routes
    )
    share = batch_size // process_count
    local = slice(process_index * share, (process_index + 1) * share)
    batches = Batches(reader, num_epochs, batch_size, local, config.prefetch, targets)
    return Pipeline(iter(ahead(batches, config.prefetch)), reader)
