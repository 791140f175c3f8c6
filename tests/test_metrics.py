"""Rows of metrics: what they hold, when they appear, and what survives a killed run."""

import dataclasses
import io
import json
import struct

import jax
import jax.numpy as jnp
import pytest

from jpt.metrics import Metrics, Run, make_writers, peak_memory
from jpt.training.console import Console, duration, line_of
from jpt.training.writers import JsonLines, TensorBoard, require_package


class Memory:
    """A writer that keeps its rows."""

    def __init__(self):
        self.rows = []

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.rows.append('closed')


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _metrics(writer, clock, **changes):
    values = {
        'total_steps': 5,
        'tokens_per_step': 1000,
        'flops_per_token': 989.4e9,
        'devices': 2,
        'device_kind': 'NVIDIA H100 80GB HBM3',
        'log_every': 2,
    }
    return Metrics(Run(**(values | changes)), [writer], clock)


def test_a_run_that_resumes_within_a_row_writes_the_whole_row():
    rows = {name: Memory() for name in ('whole', 'before', 'after')}
    whole = _metrics(rows['whole'], Clock(), log_every=4)
    before = _metrics(rows['before'], Clock(), log_every=4)
    for step in (1, 2, 3, 4):
        whole.push(step, {'loss': (0.1 * step, step)})
    whole.flush()
    for step in (1, 2):
        before.push(step, {'loss': (0.1 * step, step)})
    before.flush()
    window = json.loads(json.dumps(before.window()))
    run = dataclasses.replace(before._run, first_step=2)
    after = Metrics(run, [rows['after']], Clock(), window)
    for step in (3, 4):
        after.push(step, {'loss': (0.1 * step, step)})
    after.flush()
    assert rows['before'].rows == []
    assert rows['after'].rows[0][1]['loss'] == rows['whole'].rows[0][1]['loss'] == pytest.approx(0.1)
    assert after.window() == whole.window() == {}


def test_values_come_one_step_late_and_rows_are_sums_over_counts():
    writer, clock = Memory(), Clock()
    metrics = _metrics(writer, clock)
    assert metrics.push(1, {'loss': (jnp.float32(6), jnp.float32(2)), 'lr': (0.1, 1.0)}) is None
    clock.now += 4
    assert metrics.push(2, {'loss': (jnp.float32(2), jnp.float32(6)), 'lr': (0.3, 1.0)}) == {'loss': 3.0, 'lr': 0.1}
    assert writer.rows == []
    with metrics.timed('data'):
        clock.now += 1
    with metrics.timed('eval'):
        clock.now += 5
    assert metrics.push(3, {'loss': (0.0, 0.0)}) == pytest.approx({'loss': 1 / 3, 'lr': 0.3})
    ((step, row),) = writer.rows
    assert step == 2
    assert (row['loss'], row['lr']) == (1.0, pytest.approx(0.2))
    assert row['tokens'] == 2000
    assert row['tokens_per_second'] == pytest.approx(2000 / 5)  # ten seconds, less five of evaluation
    assert row['mfu'] == pytest.approx(989.4e9 * 400 / 2 / 989.4e12)
    assert row['seconds_per_step'] == pytest.approx(5)
    assert row['eta_seconds'] == pytest.approx(15)
    assert (row['seconds_data'], row['seconds_eval'], row['seconds_step']) == (1, 5, 4)
    assert row['memory_gib'] > 0
    # A count of zero has no mean, and the last step is written though it is odd.
    assert metrics.flush() == {}
    assert metrics.flush() is None
    clock.now += 1
    metrics.push(4, {'loss': (1.0, 1.0)})
    metrics.push(5, {'loss': (2.0, 1.0)})
    metrics.close()
    assert [row[0] for row in writer.rows[:-1]] == [2, 4, 5]
    assert writer.rows[-2][1]['loss'] == 2.0
    assert writer.rows[-1] == 'closed'


def test_a_resumed_run_counts_its_own_steps_only():
    writer, clock = Memory(), Clock()
    metrics = _metrics(writer, clock, first_step=3, device_kind='cpu', total_steps=9, log_every=1)
    with metrics.compiling():
        clock.now += 60
    metrics.push(4, {'loss': (1.0, 1.0)})
    metrics.flush()
    clock.now += 2
    metrics.push(5, {'loss': (1.0, 1.0)})
    metrics.flush()
    (_, first), (step, row) = writer.rows
    assert (first['tokens'], first['loss'], first['seconds_step']) == (4000, 1.0, pytest.approx(0, abs=1e-6))
    assert 'tokens_per_second' not in first  # its only step was the one that compiled
    assert (step, row['tokens'], row['tokens_per_second'], row['eta_seconds']) == (5, 5000, 500, 8)
    assert 'mfu' not in row


def test_evaluations_are_rows_with_their_tokens():
    writer = Memory()
    _metrics(writer, Clock()).record(3, {'eval_loss': 2.5})
    assert writer.rows == [(3, {'tokens': 3000.0, 'eval_loss': 2.5})]


def test_json_lines_resume_without_duplicates_or_torn_lines(tmp_path):
    path = tmp_path / 'out' / 'metrics.jsonl'
    writer = JsonLines(path, last_step=0)
    for step in (1, 2, 3):
        writer.write(step, {'loss': step / 2})
    writer.close()
    with path.open('a') as file:
        file.write('{"step": 4, "lo')  # killed while writing
    writer = JsonLines(path, last_step=2)
    writer.write(3, {'loss': float('nan'), 'lr': 0.5})
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {'step': 1, 'loss': 0.5},
        {'step': 2, 'loss': 1.0},
        {'step': 3, 'lr': 0.5, 'not_finite': ['loss']},
    ]
    assert [file.name for file in path.parent.iterdir()] == ['metrics.jsonl']


def test_json_lines_refuse_a_damaged_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2: not JSON'):
        JsonLines(path, last_step=5)


def test_rows_are_on_disk_when_write_returns(tmp_path):
    writer = JsonLines(tmp_path / 'metrics.jsonl', last_step=0)
    writer.write(1, {'loss': 1.0})
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "loss": 1.0}\n'
    writer.close()


def test_tensorboard_gets_the_scalars(tmp_path):
    event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2', reason='tensorboardX is not installed')
    writer = TensorBoard(tmp_path, last_step=0)
    writer.write(7, {'loss': 1.5})
    writer.close()
    (path,) = tmp_path.iterdir()
    data, scalars = path.read_bytes(), {}
    while data:  # a record: length, its checksum, event, its checksum
        (length,) = struct.unpack('<Q', data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars.update({value.tag: (event.step, value.simple_value) for value in event.summary.value})
        data = data[16 + length :]
    assert scalars['loss'] == (7, 1.5)


def test_a_writer_whose_package_is_absent_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r'log\.x asks for the package no_such_package, which is not installed'):
        require_package('no_such_package', 'log.x')


def test_only_process_0_writes(tmp_path, monkeypatch):
    writers = make_writers(tmp_path, 10, 0)
    assert [type(writer).__name__ for writer in writers] == ['Console', 'JsonLines']
    for writer in writers:
        writer.close()
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    assert make_writers(tmp_path, 10, 0) == []


def test_plain_console_writes_one_line_per_row():
    stream = io.StringIO()
    console = Console(200, stream)
    console.say('compiling')
    row = {
        'loss': 2.34567,
        'lr': 3e-4,
        'tokens_per_second': 12345.6,
        'mfu': 0.4321,
        'tokens': 5.0,
        'eta_seconds': 125.0,
    }
    console.write(10, row)
    console.write(20, {'eval_loss': 2.0, 'tokens': 5.0})
    console.close()
    assert stream.getvalue().splitlines() == [
        'compiling',
        'step 10/200  loss 2.3457  lr 3.00e-04  12,346 tok/s  MFU 43.2%  ETA 2 min 05 s',
        'step 20/200  held-out loss 2.0000',
    ]


def test_a_terminal_keeps_messages_and_shows_the_last_row():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    console = Console(200, stream)
    console.say('[not markup]')
    console.write(10, {'loss': 2.0, 'eta_seconds': 5.0})
    console.close()
    console.close()
    assert '[not markup]' in stream.getvalue()
    assert '10/200' in stream.getvalue()
    assert 'loss 2.0000  ETA 5 s' in stream.getvalue()


def test_compilation_is_announced():
    stream, clock = io.StringIO(), Clock()
    metrics = _metrics(Console(5, stream), clock)
    with metrics.compiling():
        clock.now += 75
    assert stream.getvalue().startswith('compiling the training step (once')
    assert stream.getvalue().endswith('compiled the training step in 1 min 15 s\n')


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0.4, '0 s'), (59.6, '1 min 00 s'), (200, '3 min 20 s'), (18420, '5 h 07 min')]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_shows_nothing_it_does_not_know():
    assert line_of({'unknown': 3.0}) == ''


@pytest.mark.parametrize(
    ('values', 'text'),
    [
        ({'loss': 2.0, 'ce': 2.0}, 'loss 2.0000'),
        ({'loss': 0.5, 'kl': 0.5, 'ce': 4.0}, 'loss = KL 0.5000  CE 4.0000'),
        ({'loss': 1.5, 'kl': 0.5, 'ce': 4.0}, 'loss 1.5000  KL 0.5000  CE 4.0000'),
        ({'eval_loss': 0.5, 'eval_kl': 0.5, 'eval_ce': 4.0}, 'held-out loss = KL 0.5000  CE 4.0000'),
    ],
)
def test_a_line_says_what_the_loss_is(values, text):
    assert line_of(values) == text


def test_peak_memory_is_that_of_this_process_on_a_cpu():
    assert 50 * 2**20 < peak_memory() < 2**40
