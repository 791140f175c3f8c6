"""What a training step eats: a NamedTuple of [B, T] arrays, and how rows of tokens become it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """A batch of packed rows; a pytree of numpy or jax arrays of shape [B, T], those of a sparse target [B, T, J],
    a teacher's own tokens [B, U].

    A position whose loss_mask is 0 may hold any valid id in targets; padding has segment 0, position 0 and loss_mask 0.
    """

    tokens: Any  # int32, the inputs
    targets: Any  # int32, the token that follows each input
    loss_mask: Any  # float32, the weight of each target: 0, 1, or anything not negative
    positions: Any  # int32, restart at 0 with every segment
    segment_ids: Any  # int32, 1.. per document in a row, 0 where there is padding
    sparse_target: Any = None  # a SparseTarget, what a teacher said of each target, where it was recorded
    teacher: Any = None  # TeacherTokens, the same text as a teacher with another tokenizer reads it
    route: Any = None  # int32, the number of the teacher that a document's record names; where data are routed


def make_targets(ids: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts one document into (inputs, targets, target weights), each one shorter than the document.

    ids: int [n], n >= 2. loss: [n], the weight of predicting each token; the first token is never predicted.
    """
    if len(ids) != len(loss):
        raise ValueError(f'make_targets: {len(ids)} token ids but {len(loss)} loss weights; they must be equally many')
    if len(ids) < 2:
        raise ValueError(f'make_targets: a document of {len(ids)} tokens has nothing to predict; at least 2 are needed')
    return ids[:-1].astype(np.int32), ids[1:].astype(np.int32), np.asarray(loss[1:], np.float32)


def empty_batch(batch_size: int, seq_len: int, pad_id: int = 0) -> Batch:
    """A batch [batch_size, seq_len] of padding only: segment 0 everywhere and no loss."""
    shape = (batch_size, seq_len)
    return Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
    )


def pack_rows(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    seq_len: int,
    pad_id: int = 0,
    batch_size: int | None = None,
) -> Batch:
    """Lays documents beside each other: row b of the result holds rows[b] in order, then padding.

    rows: for each row its documents as (ids [n], loss weights [n]); a document occupies n - 1 positions.
    batch_size: at least len(rows), the rest is filled with empty rows; default len(rows).
    """
    size = len(rows) if batch_size is None else batch_size
    if len(rows) > size:
        raise ValueError(f'pack_rows: {len(rows)} rows do not fit batch_size {size}')
    batch = empty_batch(size, seq_len, pad_id)
    for b, documents in enumerate(rows):
        start = 0
        for segment, (ids, loss) in enumerate(documents, start=1):
            tokens, targets, weights = make_targets(ids, loss)
            end = start + len(tokens)
            if end > seq_len:
                raise ValueError(f'pack_rows: the documents of row {b} need more than seq_len {seq_len} positions')
            batch.tokens[b, start:end] = tokens
            batch.targets[b, start:end] = targets
            batch.loss_mask[b, start:end] = weights
            batch.positions[b, start:end] = np.arange(len(tokens))
            batch.segment_ids[b, start:end] = segment
            start = end
    return batch
