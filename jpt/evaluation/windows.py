"""Texts of any length as rows of a fixed length, every token predicted exactly once."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jpt.data.batch import Batch, empty_batch


def windows(ids: Sequence[int], length: int, context: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pieces of at most length + 1 tokens, and how many targets at the start of each are context only.

    A piece after the first begins with `context` tokens that were predicted before, so that no token but the first few
    is predicted from almost nothing.

    Raises:
        ValueError: context does not leave room for new tokens.
    """
    if not 0 <= context < length:
        raise ValueError(f'context={context}: expected a number from 0 to length - 1 = {length - 1}')
    array = np.asarray(ids, np.int32)
    start, done = 0, 0
    while done < len(array) - 1:
        piece = array[start : start + length + 1]
        yield piece, done - start
        done = start + len(piece) - 1
        start = done - context


def rows_of(texts: Iterable[Sequence[int]], length: int, context: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(number of the text, piece, targets that are context only) of every window of every text."""
    for number, ids in enumerate(texts):
        for piece, skipped in windows(ids, length, context):
            yield number, piece, skipped


def batches_of(
    rows: Iterable[tuple[int, np.ndarray, int]], batch_size: int, length: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches of one window per row, and which text each row belongs to [B] (-1 for an empty row)."""
    pending: list[tuple[int, np.ndarray, int]] = []
    for row in rows:
        pending.append(row)
        if len(pending) == batch_size:
            yield _batch(pending, batch_size, length)
            pending = []
    if pending:
        yield _batch(pending, batch_size, length)


def _batch(rows: list[tuple[int, np.ndarray, int]], batch_size: int, length: int) -> tuple[Batch, np.ndarray]:
    batch = empty_batch(batch_size, length)
    owner = np.full(batch_size, -1, np.int32)
    for index, (number, piece, skipped) in enumerate(rows):
        size = len(piece) - 1
        batch.tokens[index, :size] = piece[:-1]
        batch.targets[index, :size] = piece[1:]
        batch.loss_mask[index, skipped:size] = 1
        batch.positions[index, :size] = np.arange(size)
        batch.segment_ids[index, :size] = 1
        owner[index] = number
    return batch, owner
