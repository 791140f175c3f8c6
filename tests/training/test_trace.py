"""Profiler traces: of the steps that were asked for, and of no others."""

import jax.numpy as jnp
import pytest

from jpt.config import ConfigError
from jpt.training import trace as module
from jpt.training.settings import LogConfig
from jpt.training.trace import Trace


@pytest.fixture
def calls(monkeypatch):
    """What the profiler was told, instead of running it."""
    told = []
    monkeypatch.setattr(module.jax.profiler, 'start_trace', lambda folder: told.append(('start', folder)))
    monkeypatch.setattr(module.jax.profiler, 'stop_trace', lambda: told.append(('stop',)))
    return told


def run(trace, steps, calls):
    notes = []
    for step in steps:
        with trace.before(step):
            calls.append(step)
        notes.append(trace.after(step, jnp.zeros(())))
    return [note for note in notes if note]


@pytest.mark.parametrize(
    ('asked', 'steps', 'expected'),
    [
        (None, [1, 2], [1, 2]),
        ((2, 3), [1, 2, 3, 4], [1, 'start', 2, 3, 'stop', 4]),
        ((2, 2), [1, 2, 3], [1, 'start', 2, 'stop', 3]),
        ((2, 4), [3, 4, 5], ['start', 3, 4, 'stop', 5]),  # resumed within
        ((2, 4), [5, 6], [5, 6]),  # resumed after
        ((2, 9), [1, 2, 3], [1, 'start', 2, 3, 'stop']),  # the run ends before
    ],
)
def test_steps_that_are_recorded(tmp_path, calls, asked, steps, expected):
    with Trace(asked, tmp_path) as trace:
        notes = run(trace, steps, calls)
    assert [call if isinstance(call, int) else call[0] for call in calls] == expected
    ended = asked is not None and steps[0] <= asked[1] <= steps[-1]
    assert len(notes) == ended
    recorded = [step for step in steps if asked and asked[0] <= step <= asked[1]]
    assert all(f'of steps {recorded[0]} to {recorded[-1]}: ' in note and str(tmp_path) in note for note in notes)


def test_an_error_ends_the_trace(tmp_path, calls):
    with pytest.raises(KeyError), Trace((1, 5), tmp_path) as trace, trace.before(1):
        raise KeyError
    assert calls == [('start', str(tmp_path)), ('stop',)]


def test_a_trace_is_written(tmp_path):
    with Trace((1, 1), tmp_path) as trace:
        run(trace, [1], [])
    assert [path.stat().st_size > 0 for path in tmp_path.rglob('*.xplane.pb')] == [True]


@pytest.mark.parametrize('steps', [(0, 3), (4, 3)])
def test_steps_that_cannot_be(steps):
    with pytest.raises(ConfigError, match=r'LogConfig\.profile=.*counted from 1'):
        LogConfig(profile=steps)
