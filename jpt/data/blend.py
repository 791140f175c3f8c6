"""The order in which documents are read: shuffled anew every epoch, and blended from several sources by weight.

The order is the same on every host, and the place in it is one number (and, for weights, a count per source), so a
checkpoint is small and resuming costs nothing.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def blend_order(weights: Sequence[float], count: int, taken: Sequence[int] | None = None) -> np.ndarray:
    """The next `count` source indices (int64) of Megatron's blend.

    At step s the source with the largest sampling error w_i * max(s, 1) - taken_i is read, the first one of equals;
    weights [1/2, 1/4, 1/4] give 0, 1, 2, 0. weights: positive, of any sum. taken: how many documents each source has
    given before; default none. Source: BlendedDataset, build_blending_indices in megatron/core/datasets/helpers.cpp.
    """
    share = np.asarray(weights, np.float64)
    share = share / share.sum()
    given = np.zeros(len(share), np.int64) if taken is None else np.array(taken, np.int64)
    start = int(given.sum())
    order = np.zeros(count, np.int64)
    for i in range(count):
        chosen = int(np.argmax(share * max(start + i, 1) - given))
        order[i] = chosen
        given[chosen] += 1
    return order


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that differs for any different parts: sums such as seed + epoch would repeat orders."""
    text = '/'.join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'little')


def shuffled(indices: Sequence[int] | np.ndarray, length: int, seed: int) -> np.ndarray:
    """Where a permutation of range(length), given by the 32-bit seed, sends each index; no memory of size length."""
    from grain.experimental import index_shuffle

    return np.array([index_shuffle(int(i), max_index=length - 1, seed=seed, rounds=4) for i in indices], np.int64)


class Order:
    """The endless global order of documents over some sources.

    Without weights every epoch visits every document of every source once, in one common shuffle. With weights the
    sources are read in the blend's order, each from its own shuffle, which is new every time the source is through;
    an epoch is then as many documents as all sources hold.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float] | None, seed: int, shuffle: bool):
        """lengths: documents in each source. weights: one per source, or None."""
        self.lengths, self.weights, self.seed, self.shuffle = tuple(lengths), weights, seed, shuffle
        self.epoch_length = sum(lengths)
        self._ends = np.cumsum(lengths)

    def block(self, position: int, count: int, taken: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Documents position .. position + count of the order, as source and index within the source (int64 [count]).

        taken: documents that each source gave before `position`; read for weighted blends only. A block must lie in
        one epoch.
        """
        epoch, offset = divmod(position, self.epoch_length)
        if offset + count > self.epoch_length:
            raise ValueError(f'Order.block: {count} documents from {position} cross the end of epoch {epoch}')
        if self.weights is not None:
            return self._blended(count, taken)
        flat = np.arange(offset, offset + count)
        if self.shuffle:
            flat = shuffled(flat, self.epoch_length, derive_seed('documents', self.seed, epoch))
        source = np.searchsorted(self._ends, flat, side='right')
        return source, flat - (self._ends[source] - np.take(self.lengths, source))

    def _blended(self, count: int, taken: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        source = blend_order(self.weights or (), count, taken)
        index = np.zeros(count, np.int64)
        for s, length in enumerate(self.lengths):
            where = np.flatnonzero(source == s)
            ranks = taken[s] + np.arange(len(where))
            for epoch in np.unique(ranks // length):
                inside = ranks // length == epoch
                found = ranks[inside] % length
                if self.shuffle:
                    found = shuffled(found, length, derive_seed('source', self.seed, s, int(epoch)))
                index[where[inside]] = found
        return source, index
