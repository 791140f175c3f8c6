"""The 1F1B timetable against what a pipeline is: played out step by step with named values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpt.sharding.timetable import timetable, waste

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 11))


def play(pipe: int, chunks: int, num_microbatches: int) -> int:
    """Runs the timetable on strings that record where a value has been; returns the most inputs held by one device."""
    rows, num_slots = timetable(pipe, chunks, num_microbatches)
    right, left = [''] * pipe, [''] * pipe  # what arrives at each device
    ring = [[''] * num_slots for _ in range(pipe)]
    finished, returned, busy = [], [], 0
    for tick in range(len(rows.head)):
        out, back = [''] * pipe, [''] * pipe
        for device in range(pipe):
            micro, chunk, slot = (int(column[tick, device]) for column in rows.forward)
            if micro >= 0:
                first = device == 0 and chunk == 0
                assert first == (rows.embed[tick] == micro and device == 0)
                ring[device][slot] = f'{micro}' if first else right[device]
                stage = chunk * pipe + device
                assert ring[device][slot] == ' '.join([f'{micro}', *map(str, range(stage))])
                out[device] = f'{ring[device][slot]} {stage}'
                busy += 1
        if rows.head[tick] >= 0:
            assert out[-1].split()[0] == str(rows.head[tick])
            finished.append(int(rows.head[tick]))
        for device in range(pipe):
            micro, chunk, slot = (int(column[tick, device]) for column in rows.backward)
            if micro >= 0:
                stage = chunk * pipe + device
                last = stage == pipe * chunks - 1
                given = f'd{rows.head[tick]}' if last else left[device]
                behind = [str(later) for later in reversed(range(stage + 1, pipe * chunks))]
                assert given == ' '.join([f'd{micro}', *behind])
                assert ring[device][slot] == ' '.join([f'{micro}', *map(str, range(stage))])
                back[device] = f'{given} {stage}'
                busy += 1
        if rows.leave[tick] >= 0:
            assert back[0].split()[0] == f'd{rows.leave[tick]}'
            assert back[0].split()[-1] == '0'
            returned.append(int(rows.leave[tick]))
        right, left = [out[-1], *out[:-1]], [*back[1:], back[0]]
    assert finished == returned == list(range(num_microbatches))
    assert busy == 2 * num_microbatches * pipe * chunks
    return num_slots


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_every_microbatch_passes_every_stage_forth_and_back(shape):
    play(*shape)


@pytest.mark.parametrize(('pipe', 'chunks', 'groups'), [(2, 1, 3), (4, 1, 4), (4, 2, 2), (2, 3, 5), (8, 4, 2)])
def test_idle_share_is_that_of_the_paper(pipe, chunks, groups):
    """Narayanan et al. 2021, section 2.2.2: the bubble is (p - 1) / v of the time of one microbatch."""
    count = groups * pipe
    bubble = (pipe - 1) / chunks
    assert waste(pipe, chunks, count).idle == pytest.approx(bubble / (count + bubble), rel=1e-12)
    assert waste(pipe, chunks, count, backward_cost=2.0).idle == pytest.approx(bubble / (count + bubble), rel=1e-12)


def test_skipping_bubbles_saves_what_the_lock_step_would_waste():
    """Without skipping, M + 2 (p - 1) ticks of forward and backward each."""
    report = waste(4, 1, 8)
    assert report.ticks == 14
    assert report.busy == 16
    assert report.lockstep_idle == pytest.approx(6 / 14, rel=1e-12)
    assert report.idle == pytest.approx(3 / 11, rel=1e-12)


@pytest.mark.parametrize('chunks', [1, 2])
def test_inputs_held_do_not_grow_with_microbatches(chunks):
    few, many = timetable(4, chunks, 8), timetable(4, chunks, 64)
    assert few.num_slots == many.num_slots
    assert timetable(4, 1, 64).num_slots == 2 * 4 - 1


def test_idle_places_are_marked():
    rows, _ = timetable(3, 1, 2)
    ahead = [[0, 1, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1], [-1, -1, 0, 1, -1, -1]]
    back = [[-1, -1, -1, -1, 0, 1], [-1, -1, -1, 0, 1, -1], [-1, -1, 0, 1, -1, -1]]
    np.testing.assert_array_equal(rows.forward.micro.T, ahead)
    np.testing.assert_array_equal(rows.backward.micro.T, back)
