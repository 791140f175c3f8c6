"""Batch: rows laid out by hand."""

import numpy as np
import pytest

from jpt.data.batch import Batch, empty_batch, make_targets, pack_rows


def test_targets_are_the_next_tokens_and_carry_their_own_weight():
    tokens, targets, weights = make_targets(np.array([5, 6, 7, 8], np.uint16), np.array([9.0, 0.0, 1.0, 0.5]))
    assert tokens.tolist() == [5, 6, 7]
    assert targets.tolist() == [6, 7, 8]
    assert weights.tolist() == [0.0, 1.0, 0.5]
    assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize(
    ('ids', 'loss', 'message'), [([1], [1], 'nothing to predict'), ([1, 2], [1], '2 token ids but 1')]
)
def test_targets_refuse_what_has_none(ids, loss, message):
    with pytest.raises(ValueError, match=message):
        make_targets(np.array(ids), np.array(loss))


def test_rows_by_hand():
    one, two = (np.array([10, 11, 12]), np.array([0, 0, 1])), (np.array([20, 21]), np.array([1, 1]))
    batch = pack_rows([[one, two], [two]], seq_len=4, pad_id=7, batch_size=3)
    assert batch.tokens.tolist() == [[10, 11, 20, 7], [20, 7, 7, 7], [7, 7, 7, 7]]
    assert batch.targets.tolist() == [[11, 12, 21, 7], [21, 7, 7, 7], [7, 7, 7, 7]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert [array.dtype for array in batch[:5]] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_rows_that_do_not_fit_are_refused():
    document = (np.arange(6), np.ones(6))
    with pytest.raises(ValueError, match='row 0 need more than seq_len 4'):
        pack_rows([[document]], seq_len=4)
    with pytest.raises(ValueError, match='2 rows do not fit batch_size 1'):
        pack_rows([[], []], seq_len=4, batch_size=1)


def test_an_empty_batch_has_no_loss_and_no_segment():
    batch = empty_batch(2, 3, pad_id=4)
    assert isinstance(batch, Batch)
    assert batch.tokens.tolist() == [[4, 4, 4]] * 2
    assert not batch.loss_mask.any()
    assert not batch.segment_ids.any()
