"""Visibility against numpy, and block by block: nothing visible is missed, and what is skipped is what it should be."""

from functools import partial

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


needed_jit = jax.jit(needed, static_argnums=1)


def blocks(places):
    return Places(*(x.reshape(*x.shape[:-1], -1, BLOCK) for x in places))


@pytest.mark.parametrize('mask', MASKS, ids=str)
def test_needed_covers_every_visible_pair(mask):
    """Packed rows, shuffled rows (a cache written out of order) and padding, in one program per mask."""
    rng = np.random.default_rng(2)
    positions, segments = packed_places(rng, ROWS, LENGTH, segments=4, padding=9)
    order = np.array([rng.permutation(LENGTH) if row % 2 else np.arange(LENGTH) for row in range(ROWS)])
    k_positions, k_segments = (np.take_along_axis(x, order, axis=1) for x in (positions, segments))
    places = Places(positions, k_positions, segments, k_segments)

    @partial(jax.jit, static_argnums=0)
    def both(mask, places):
        return visible(places, mask), needed(blocks(places), mask)

    pairs, need = map(np.asarray, both(Mask(**mask), places))
    np.testing.assert_array_equal(pairs, seen(places, **mask))
    holds = pairs.reshape(ROWS, LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK).any(axis=(2, 4))
    assert not (holds & ~need).any(), 'a block with a visible pair would be skipped'
    in_order = slice(0, None, 2)
    if set(mask) <= {'window'}:
        # Rows in order, causal: a block too many happens only where a block holds several documents.
        assert (need & ~holds)[in_order].sum() <= 0.1 * holds[in_order].sum()


def test_one_long_document_costs_half_and_a_window_costs_its_width():
    positions = np.arange(1024, dtype=np.int32)[None]
    places = blocks(Places(positions, positions, np.ones_like(positions), np.ones_like(positions)))
    count = 1024 // BLOCK
    assert int(needed_jit(places, Mask()).sum()) == count * (count + 1) // 2
    # A window of 17 reaches 16 keys back: two blocks before the diagonal one, but for the first two rows of blocks.
    assert int(needed_jit(places, Mask(window=17)).sum()) == 3 * count - 3
    assert int(needed_jit(places, Mask(chunk=64)).sum()) == (1024 // 64) * (8 * 9 // 2)


def test_padding_needs_nothing():
    empty = np.zeros((1, 16), np.int32)
    assert not np.asarray(needed_jit(blocks(Places(empty, empty, empty, empty)), Mask())).any()
