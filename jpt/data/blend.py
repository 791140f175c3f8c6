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
    """A 64-bit seed that differs for any different parts: sums such as seed + epoch would repeat orders."""
    text = '/'.join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'little')


def permutation(length: int, seed: int) -> np.ndarray:
    """A random order of range(length) (int64), the same on every machine and for every version of every library.

    Sorts by a hash of (seed, index): the finalizer of splitmix64 (Steele, Lea, Flood 2014).
    """
    x = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(x ^ (x >> np.uint64(31)), kind='stable')


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
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}  # of the current epoch

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
            flat = self._permutation('all', epoch, self.epoch_length)[flat]
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
                    found = self._permutation(f'source {s}', int(epoch), length)[found]
                index[where[inside]] = found
        return source, index

    def _permutation(self, name: str, epoch: int, length: int) -> np.ndarray:
        cached = self._permutations.get(name)
        if cached is None or cached[0] != epoch:
            cached = (epoch, permutation(length, derive_seed(name, self.seed, epoch)))
            self._permutations[name] = cached
        return cached[1]
