"""Packing: every position once, and as few rows as can be shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpt.data.packing import (
    PACKINGS,
    Piece,
    best_fit_decreasing,
    cut,
    cut_to_fill,
    exact_fits,
    fill,
    pack_best_fit,
    pack_concat,
)

LENGTHS = st.lists(st.integers(0, 70), max_size=40)


@pytest.mark.parametrize('name', sorted(PACKINGS))
@given(lengths=LENGTHS, seq_len=st.integers(1, 32))
def test_every_position_is_packed_once_and_rows_hold(name, lengths, seq_len):
    rows = PACKINGS[name](lengths, seq_len)
    assert all(row and sum(piece.length for piece in row) <= seq_len for row in rows)
    covered = sorted((p.document, p.start + k) for row in rows for p in row for k in range(p.length))
    assert covered == [(d, k) for d, length in enumerate(lengths) for k in range(length)]
    assert all(row == sorted(row) for row in rows)  # documents in order within a row
    assert rows == sorted(rows)


@pytest.mark.parametrize('name', ['best_fit', 'none'])
@given(lengths=LENGTHS, seq_len=st.integers(1, 32))
def test_documents_are_cut_only_where_they_must(name, lengths, seq_len):
    pieces = sorted(piece for row in PACKINGS[name](lengths, seq_len) for piece in row)
    assert pieces == cut(lengths, seq_len)
    for d, length in enumerate(lengths):
        of_document = [piece.length for piece in pieces if piece.document == d]
        assert of_document == [seq_len] * (length // seq_len) + [length % seq_len] * (length % seq_len > 0)


@given(LENGTHS, st.integers(1, 32))
def test_concat_wastes_nothing_before_the_last_row(lengths, seq_len):
    rows = pack_concat(lengths, seq_len)
    assert len(rows) == -(-sum(lengths) // seq_len)
    assert all(sum(piece.length for piece in row) == seq_len for row in rows[:-1])


def fewest_rows(lengths, seq_len):
    """The optimum, over all ways to take a row's documents out of a set."""
    subsets = range(1, 2 ** len(lengths))
    one_row = [s for s in subsets if sum(x for i, x in enumerate(lengths) if s >> i & 1) <= seq_len]
    best = {0: 0}
    for s in subsets:
        best[s] = 1 + min(best[s & ~row] for row in one_row if row & s == row)
    return best[2 ** len(lengths) - 1]


@given(st.lists(st.integers(1, 12), max_size=5), st.integers(12, 20))
def test_best_fit_stays_within_its_bound(lengths, seq_len):
    fewest = fewest_rows(lengths, seq_len)
    assert fewest <= len(pack_best_fit(lengths, seq_len)) <= 11 / 9 * fewest + 6 / 9


def test_best_fit_takes_the_fullest_row_that_has_room():
    # 6 and 5 open rows; 4 fits both and goes to the 6 (room 4), 3 goes to the 5 (room 5), 2 fits there as well.
    rows = best_fit_decreasing(cut([2, 3, 4, 5, 6], 10), 10)
    assert [sorted(piece.length for piece in row) for row in rows] == [[4, 6], [2, 3, 5]]


def test_exact_fits_use_up_the_middle_lengths():
    # Three equal thirds and pairs of halves: decreasing order alone would be as good, the count is what matters.
    lengths = [4] * 6 + [6] * 4 + [3, 3, 3, 3] + [5, 5]
    rows, rest = exact_fits(cut(lengths, 12), 12)
    assert all(sum(piece.length for piece in row) == 12 for row in rows)
    assert sorted(piece.length for row in rows for piece in row) + sorted(p.length for p in rest) != []
    assert sorted([piece for row in rows for piece in row] + rest) == cut(lengths, 12)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(8, 32))
def test_exact_rows_are_full_and_the_rest_is_whole(lengths, seq_len):
    pieces = cut(lengths, seq_len)
    rows, rest = exact_fits(pieces, seq_len)
    assert all(sum(piece.length for piece in row) == seq_len for row in rows)
    assert sorted([piece for row in rows for piece in row] + rest) == pieces


def test_best_fit_decreasing_alone_would_need_more_rows():
    # Lengths like those of school mathematics: a fifth of a row, little spread.
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(8, 24, 2600), 40, 512).astype(int)
    decreasing = best_fit_decreasing(cut(lengths, 512), 512)
    rows = pack_best_fit(lengths, 512)
    least = -(-int(lengths.sum()) // 512)
    assert len(rows) <= 1.01 * least < 1.015 * least < len(decreasing)
    assert fill(rows, 512) > 0.99


def test_a_perfect_packing_is_found():
    rng = np.random.default_rng(1)
    lengths = []
    for _ in range(64):  # 64 rows of 128, each broken at random
        cuts = np.sort(rng.choice(np.arange(1, 128), 4, replace=False))
        lengths += np.diff([0, *cuts, 128]).tolist()
    rows = pack_best_fit(rng.permutation(lengths), 128)
    assert len(rows) <= 65


def test_fill():
    assert fill([[Piece(0, 0, 3)], [Piece(1, 0, 4), Piece(2, 0, 1)]], 5) == 0.8
    assert fill([], 5) == 1.0


def cut_documents(rows, lengths):
    return {piece.document for row in rows for piece in row if piece.length < lengths[piece.document]}


@given(LENGTHS, st.integers(1, 32), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_cutting_reaches_the_fill_that_is_asked_for(lengths, seq_len, least):
    whole = pack_best_fit(lengths, seq_len)
    rows = cut_to_fill(whole, seq_len, least)
    covered = sorted((p.document, p.start + k) for row in rows for p in row for k in range(p.length))
    assert covered == [(d, k) for d, length in enumerate(lengths) for k in range(length)]
    assert all(sum(piece.length for piece in row) <= seq_len for row in rows)
    assert fill(rows, seq_len) >= least or len(rows) == -(-sum(lengths) // seq_len)
    if fill(whole, seq_len) >= least or len(whole) == -(-sum(lengths) // seq_len):
        assert rows == whole


def test_nothing_is_cut_unless_asked():
    rows = pack_best_fit([6] * 50, 10)
    assert (len(rows), cut_to_fill(rows, 10, 0.0)) == (50, rows)


def test_cutting_takes_as_few_documents_as_needed():
    # 40 full rows and 20 rows of 6 positions: 52 tenths are needed at least, so 520 / 0.99 allow 52 rows.
    lengths = [10] * 40 + [6] * 20
    rows = cut_to_fill(pack_best_fit(lengths, 10), 10, 0.99)
    assert len(rows) == 52
    cuts = cut_documents(rows, lengths)
    assert all(lengths[d] == 6 for d in cuts)
    assert len(cuts) < 12  # 120 positions end to end are 12 rows, with 11 ends within


def test_lengths_of_stories_fill_rows_only_when_some_are_cut():
    # Like TinyStories at 512: most are longer than a third of a row, where no more than two fit.
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(171, 230, 1800), rng.integers(342, 400, 60), rng.integers(30, 171, 700)])
    fewest = (lengths > 512 * 2 / 3).sum() + ((lengths > 512 / 3) & (lengths <= 512 * 2 / 3)).sum() / 2
    assert lengths.sum() / (512 * fewest) < 0.99  # of whole documents, whatever the packing
    whole = pack_best_fit(lengths, 512)
    assert len(whole) >= fewest
    rows = cut_to_fill(whole, 512, 0.995)
    assert fill(rows, 512) >= 0.995
    assert len(cut_documents(rows, lengths)) < 0.1 * len(lengths)
    assert len(cut_documents(pack_concat(lengths, 512), lengths)) > 0.3 * len(lengths)
