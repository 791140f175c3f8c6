"""Visibility against numpy, and block by block: nothing visible is missed, and what is skipped is what it should be."""

import jax
import numpy as np
import pytest
from numpy_attention import packed_places, seen

from jpt.kernels.masks import Mask, Places, needed, visible

MASKS = [
    {},
    {'causal': False},
    {'window': 6},
    {'causal': False, 'window': 4},
    {'chunk': 8},
    {'chunk': 5, 'window': 3, 'causal': False},
]
ROWS, LENGTH, BLOCK = 40, 48, 8


def blocks(places):
    return Places(*(x.reshape(*x.shape[:-1], -1, BLOCK) for x in places))


@jax.jit
def all_masks(places):
    """Visible pairs and needed blocks under every mask, one program for the module."""
    return [(visible(places, Mask(**mask)), needed(blocks(places), Mask(**mask))) for mask in MASKS]


@pytest.fixture(scope='module')
def rows():
    """Packed rows, every second one shuffled on the keys' side (a cache written out of order), and one all padding."""
    rng = np.random.default_rng(2)
    positions, segments = packed_places(rng, ROWS, LENGTH, segments=4, padding=9)
    segments[-1] = 0
    order = np.array([rng.permutation(LENGTH) if row % 2 else np.arange(LENGTH) for row in range(ROWS)])
    k_positions, k_segments = (np.take_along_axis(x, order, axis=1) for x in (positions, segments))
    places = Places(positions, k_positions, segments, k_segments)
    return places, jax.tree.map(np.asarray, all_masks(places))


@pytest.mark.parametrize('index', range(len(MASKS)), ids=[str(mask) for mask in MASKS])
def test_needed_covers_every_visible_pair(index, rows):
    places, results = rows
    mask, (pairs, need) = MASKS[index], results[index]
    np.testing.assert_array_equal(pairs, seen(places, **mask))
    holds = pairs.reshape(ROWS, LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK).any(axis=(2, 4))
    assert not (holds & ~need).any(), 'a block with a visible pair would be skipped'
    assert not need[-1].any(), 'padding needs nothing'
    in_order = slice(0, None, 2)
    if set(mask) <= {'window'}:
        # Rows in order, causal: a block too many happens only where a block holds several documents.
        assert (need & ~holds)[in_order].sum() <= 0.1 * holds[in_order].sum()


def test_one_long_document_costs_half_and_a_window_costs_its_width():
    positions = np.arange(1024, dtype=np.int32)[None]
    places = blocks(Places(positions, positions, np.ones_like(positions), np.ones_like(positions)))
    masks = Mask(), Mask(window=17), Mask(chunk=64)
    causal, window, chunk = map(int, jax.jit(lambda: [needed(places, mask).sum() for mask in masks])())
    count = 1024 // BLOCK
    assert causal == count * (count + 1) // 2
    # A window of 17 reaches 16 keys back: two blocks before the diagonal one, but for the first two rows of blocks.
    assert window == 3 * count - 3
    assert chunk == (1024 // 64) * (8 * 9 // 2)
