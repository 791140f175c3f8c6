"""Windows predict every token exactly once, after as much context as was asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpt.evaluation.windows import batches_of, rows_of, windows


@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 11))
def test_every_target_once_and_in_order(count, length, context):
    ids = list(range(100, 100 + count))
    if context >= length:
        with pytest.raises(ValueError, match='context='):
            list(windows(ids, length, context))
        return
    predicted = []
    for number, (piece, skipped) in enumerate(windows(ids, length, context)):
        assert len(piece) <= length + 1
        assert skipped == (0 if number == 0 else context)
        predicted += piece[1 + skipped :].tolist()
    assert predicted == ids[1:]


def test_batches_hold_the_windows_and_fill_the_last_one_with_nothing():
    texts = [[1, 2, 3, 4, 5], [7], [8, 9]]
    batches = list(batches_of(rows_of(texts, 3, 1), batch_size=2, length=3))
    assert [owner.tolist() for _, owner in batches] == [[0, 0], [2, -1]]
    first, second = batches[0][0], batches[1][0]
    np.testing.assert_array_equal(first.tokens, [[1, 2, 3], [3, 4, 0]])
    np.testing.assert_array_equal(first.targets, [[2, 3, 4], [4, 5, 0]])
    np.testing.assert_array_equal(first.loss_mask, [[1, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(first.segment_ids, [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(second.loss_mask, [[1, 0, 0], [0, 0, 0]])
