"""The global order: Megatron's blend against exact fractions, permutations, and epochs."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpt.data.blend import Order, blend_order, derive_seed, permutation


def exact_order(weights, count):
    """The same rule in exact arithmetic: the largest of w * max(step, 1) - taken, the first of equals."""
    share = [Fraction(w, sum(weights)) for w in weights]
    taken, order = [0] * len(weights), []
    for step in range(count):
        errors = [w * max(step, 1) - t for w, t in zip(share, taken, strict=True)]
        order.append(errors.index(max(errors)))
        taken[order[-1]] += 1
    return order


def test_the_published_example():
    assert blend_order([0.5, 0.25, 0.25], 4).tolist() == [0, 1, 2, 0]
    assert blend_order([2, 1, 1], 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 0]


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=5), st.integers(0, 60))
def test_the_order_is_that_of_exact_arithmetic(weights, count):
    # Shares of powers of two over a power of two are exact in float64; others may break ties by a rounding.
    weights = [*weights, 2 ** (sum(weights) - 1).bit_length() - sum(weights)]
    weights = [w for w in weights if w]
    assert blend_order(weights, count).tolist() == exact_order(weights, count)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 200))
def test_no_source_strays_from_its_share(weights, count):
    taken = np.bincount(blend_order(weights, count), minlength=len(weights))
    share = np.array(weights) / sum(weights)
    assert np.abs(taken - share * count).max() <= max(1, len(weights) - 1)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 30))
def test_the_order_goes_on_from_counts(weights, first, second):
    whole = blend_order(weights, first + second)
    taken = np.bincount(whole[:first], minlength=len(weights))
    assert blend_order(weights, second, taken.tolist()).tolist() == whole[first:].tolist()


def splitmix64(state):
    """The published generator, in Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(st.integers(0, 100), st.integers(0, 2**64 - 1))
def test_a_permutation_sorts_by_splitmix64(length, seed):
    keys = [splitmix64((seed + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(length)]
    assert permutation(length, seed).tolist() == sorted(range(length), key=keys.__getitem__)


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(3, derive_seed('x', seed)).tolist()) for seed in range(600))
    assert len(counts) == 6
    expected = 100
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 20.5  # chi squared, 5 degrees, 0.1 %


def test_orders_differ_by_seed_and_epoch():
    seeds = [derive_seed('documents', seed, epoch) for seed in range(5) for epoch in range(5)]
    orders = {tuple(permutation(50, seed).tolist()) for seed in seeds}
    assert len(orders) == 25  # also (0, 1) and (1, 0), whose sums are equal
    assert all(0 <= seed < 2**64 for seed in seeds)


def places(order, start, stop, step=7):
    """The documents of a stretch, read in blocks."""
    found, taken = [], [0] * len(order.lengths)
    for position in range(0, stop, step):
        end = min(position + step, stop, (position // order.epoch_length + 1) * order.epoch_length)
        while position < min(position + step, stop) and position < end:
            source, index = order.block(position, end - position, taken)
            found += list(zip(source.tolist(), index.tolist(), strict=True))
            taken = [t + int((source == s).sum()) for s, t in enumerate(taken)]
            position = end
    return found[start:stop]


@pytest.mark.parametrize('shuffle', [False, True])
def test_every_epoch_reads_every_document_once(shuffle):
    order = Order([5, 0, 9], None, seed=3, shuffle=shuffle)
    everything = [(0, i) for i in range(5)] + [(2, i) for i in range(9)]
    epochs = []
    for epoch in range(3):
        source, index = order.block(epoch * 14, 14, [0, 0, 0])
        epochs.append(list(zip(source.tolist(), index.tolist(), strict=True)))
        assert sorted(epochs[-1]) == everything
    assert (epochs[0] == everything) is not shuffle
    assert (epochs[0] == epochs[1]) is not shuffle


def test_blocks_do_not_change_the_order():
    for weights in (None, [0.7, 0.3]):
        order = Order([6, 10], weights, seed=1, shuffle=True)
        assert places(order, 0, 16, step=16) == places(order, 0, 16, step=4) == places(order, 0, 16, step=1)
    with pytest.raises(ValueError, match='10 documents from 10 cross the end of epoch 0'):
        order.block(10, 10, [5, 5])


def test_a_weighted_source_goes_through_all_its_documents_before_it_repeats_one():
    order = Order([4, 20], [0.5, 0.5], seed=0, shuffle=True)
    found = places(order, 0, 24, step=24)
    first = [index for source, index in found if source == 0]
    assert len(first) == 12
    for k in range(3):
        assert sorted(first[4 * k : 4 * k + 4]) == [0, 1, 2, 3]
    assert len({tuple(first[4 * k : 4 * k + 4]) for k in range(3)}) > 1  # shuffled anew
    second = [index for source, index in found if source == 1]
    assert len(set(second)) == len(second) == 12


def test_a_weighted_order_without_shuffle():
    order = Order([3, 3], [2, 1], seed=0, shuffle=False)
    assert places(order, 0, 6, step=6) == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 0)]
