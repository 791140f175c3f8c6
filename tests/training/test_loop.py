"""A run that is stopped or broken goes on to the very same numbers, and a bad batch ends it with a message."""

import json

import jax
import numpy as np
import pytest
from tiny import settings

from jpt.model import load
from jpt.training import loop
from jpt.training.run import train_model


def rows(workdir, key='loss'):
    """{step: value} from metrics.jsonl; a step that stands there twice is an error."""
    found = {}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines():
        row = json.loads(line)
        if key in row:
            assert row['step'] not in found
            found[row['step']] = row[key]
    return found


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp('whole')
    model = train_model(settings(folder), folder / 'run')
    return folder / 'run', model


def test_a_run_learns_evaluates_and_saves(whole):
    workdir, model = whole
    losses = rows(workdir)
    assert list(losses) == list(range(1, 8))
    assert losses[1] == pytest.approx(np.log(4096), rel=0.2)
    assert losses[7] < losses[1]
    assert list(rows(workdir, 'eval_loss')) == [7]
    assert sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()) == [6, 7]
    loaded = load(workdir)
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(loaded.logits(tokens), model.logits(tokens))


def test_a_run_is_not_taken_back_to_an_earlier_step(whole):
    workdir, _ = whole
    before = (workdir / 'metrics.jsonl').read_bytes()
    message = r'checkpoints: the checkpoint is at step 7, beyond config\.steps=5'
    with pytest.raises(ValueError, match=message):
        train_model(settings(workdir.parent, steps=5), workdir)
    assert (workdir / 'metrics.jsonl').read_bytes() == before


class CrashError(RuntimeError):
    """Stands for anything that ends a process between steps."""


@pytest.mark.parametrize('ends', [[2, 5], [1, 4]])
def test_stops_and_crashes_change_nothing(whole, tmp_path, monkeypatch, ends):
    """First stopped by a signal, which saves, then crashed, which does not; the numbers are those of the whole run."""
    stop, crash = ends
    config, workdir = settings(tmp_path), tmp_path / 'run'
    monkeypatch.setattr(loop, '_asked_to_stop', lambda asked, step: 'SIGTERM' if step == stop else None)
    with pytest.raises(loop.StoppedError):
        train_model(config, workdir)

    def fail(asked, step):
        if step == crash:
            raise CrashError
        return None

    monkeypatch.setattr(loop, '_asked_to_stop', fail)
    with pytest.raises(CrashError):
        train_model(config, workdir)
    monkeypatch.undo()
    train_model(config, workdir)
    assert rows(workdir) == rows(whole[0])
    assert rows(workdir, 'eval_loss') == rows(whole[0], 'eval_loss')


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_batch(tmp_path, monkeypatch):
    config, workdir = settings(tmp_path), tmp_path / 'run'
    feed = loop.Feed.__next__
    given = []

    def poisoned(self):
        batch = feed(self)
        given.append(batch)
        weight = np.nan if len(given) == 5 else 1.0
        return batch._replace(loss_mask=batch.loss_mask * weight)

    monkeypatch.setattr(loop.Feed, '__next__', poisoned)
    with pytest.raises(loop.NotFiniteError, match=r'step 5: .*refused_batch_5'):
        train_model(config, workdir)
    saved = np.load(workdir / 'refused_batch_5_process_0.npz')
    np.testing.assert_array_equal(saved['tokens'], given[4].tokens)
    monkeypatch.undo()
    train_model(config, workdir)
    assert list(rows(workdir)) == list(range(1, 8))


def test_weights_that_do_not_fit_are_explained(tmp_path, monkeypatch):
    def refuse(job):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB')

    monkeypatch.setattr(loop, 'first_state', refuse)
    with pytest.raises(MemoryError, match='bytes per device') as caught:
        train_model(settings(tmp_path), tmp_path / 'run')
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ['params', 'optimizer', 'frozen']
    assert any('12.50 GiB  in one piece, which failed' in line for line in lines)
