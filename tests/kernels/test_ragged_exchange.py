"""Which rows travel in which round, against the collective's definition played out in numpy for all shards at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpt.kernels import ragged_exchange
from jpt.kernels.ragged_exchange import FORMS, check_form, make_exchange, round_of

SHARDS, ROWS = 4, 40
NOBODY = -1


def loads():
    """Rows of each shard for each, by name: [senders, receivers]; what is left of ROWS is for no one."""
    random = np.random.default_rng(3)
    even = np.full((SHARDS, SHARDS), ROWS // SHARDS)
    lone, idle = np.zeros_like(even), even.copy()
    lone[:, 2] = ROWS
    idle[1], idle[3, 0] = 0, 0
    uneven = random.multinomial(ROWS, [0.7, 0.05, 0.05, 0.1, 0.1], size=SHARDS)[:, :SHARDS]
    return {'even': even, 'to one': lone, 'idle': idle, 'uneven': uneven, 'none': 0 * even}


def played_out(operands, outputs, begins, sizes, places, arriving):
    """`lax.ragged_all_to_all` on all shards: argument i is that of shard i. Everything must be as it demands."""
    results = [output.copy() for output in outputs]
    written = [np.zeros(len(output), bool) for output in outputs]
    for sender, operand in enumerate(operands):
        for receiver, result in enumerate(results):
            size, begin, place = sizes[sender][receiver], begins[sender][receiver], places[sender][receiver]
            assert size == arriving[receiver][sender]
            assert 0 <= begin <= begin + size <= len(operand)
            assert 0 <= place <= place + size <= len(result)
            assert not written[receiver][place : place + size].any(), 'rows over rows'
            result[place : place + size] = operand[begin : begin + size]
            written[receiver][place : place + size] = True
    return results


def travelled(operands, travel, count):
    """One round for all shards, rows that nothing reaches marked."""
    begins, sizes, places = (np.asarray(matrix) for matrix in travel)
    outputs = [np.full(count, NOBODY) for _ in operands]
    return played_out(operands, outputs, begins, sizes, places, sizes.T)


def test_the_collective_as_documented():
    """The example in the documentation of `lax.ragged_all_to_all`: two shards."""
    operands, outputs = [np.array([1, 2, 2]), np.array([3, 4, 0])], [np.zeros(4, int)] * 2
    begins, sizes, places, arriving = [[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]
    first, second = played_out(operands, outputs, begins, sizes, places, arriving)
    np.testing.assert_array_equal(first, [1, 3, 0, 0])
    np.testing.assert_array_equal(second, [2, 2, 4, 0])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('factor', [0.3, 1.0, 1.5, 4.0])
def test_every_row_travels_once_in_line_and_back(form, factor):
    """Rows are numbered by (sender, receiver, place); a shard's own beyond its loads are nobody's and stay."""
    exchange = make_exchange(form, 'expert', SHARDS, ROWS, factor)
    for name, load in loads().items():
        number = np.arange(SHARDS)[:, None] * ROWS + np.arange(ROWS)[None]
        target = np.stack([np.repeat(np.arange(SHARDS + 1), [*row, ROWS - row.sum()]) for row in load])
        needed = int(exchange.needed(jnp.asarray(load, jnp.int32)))
        assert needed <= exchange.rounds, name
        lines = [[] for _ in range(SHARDS)]
        home = np.full((SHARDS, ROWS), NOBODY)
        for turn in range(needed):
            travel = round_of(exchange, jnp.asarray(load, jnp.int32), jnp.int32(turn))
            arrived = travelled(number, travel, exchange.capacity)
            assert all((rows[np.sum(rows != NOBODY) :] == NOBODY).all() for rows in arrived), 'no gaps'
            for line, rows in zip(lines, arrived, strict=True):
                line += rows[rows != NOBODY].tolist()
            back = np.stack(travelled(arrived, travel.back(), ROWS))
            assert (home[back != NOBODY] == NOBODY).all(), 'twice'
            home = np.where(back != NOBODY, back, home)
        np.testing.assert_array_equal(home, np.where(target < SHARDS, number, NOBODY), err_msg=name)
        for receiver, line in enumerate(lines):
            assert sorted(line) == number[target == receiver].tolist(), name
            assert form == 'padded' or line == sorted(line), 'first those of the first sender'


@pytest.mark.parametrize(('form', 'rounds', 'late'), [('ragged', 3, 4 * 40 - 64), ('padded', 3, 4 * (40 - 16))])
def test_a_crowd_by_hand(form, rounds, late):
    """All 160 rows to one shard, room for 1.5 x 40, or for 1.5 x 10 from each, in eights."""
    exchange, load = make_exchange(form, 'expert', SHARDS, ROWS, 1.5), jnp.asarray(loads()['to one'], jnp.int32)
    assert (int(exchange.needed(load)), exchange.rounds, exchange.capacity) == (rounds, rounds, 64)
    assert int(load.sum() - round_of(exchange, load, jnp.int32(0)).sizes_SR.sum()) == late


def test_shares_of_many_shards_are_pooled():
    """One busy sender per receiver: its rows must wait where blocks are of one size, and need not in one line."""
    load = jnp.asarray(np.eye(SHARDS, dtype=np.int32)[::-1] * ROWS)
    assert int(make_exchange('ragged', 'expert', SHARDS, ROWS, 1.0).needed(load)) == 1
    assert int(make_exchange('padded', 'expert', SHARDS, ROWS, 1.0).needed(load)) == 3


def test_forms_that_are_not_there_are_refused(monkeypatch):
    check_form('padded')
    with pytest.raises(ValueError, match="exchange='ragged' cannot be used: the platform is cpu, not gpu"):
        check_form('ragged')
    with pytest.raises(ValueError, match="exchange='all': expected one of padded, ragged"):
        check_form('all')
    monkeypatch.setattr(ragged_exchange, 'platform', lambda: 'gpu')
    check_form('ragged')
