"""`python -m jpt.train` in two real processes: one run, one checkpoint, one export, whatever happens in between."""

import json
import shutil
import signal

import numpy as np
import processes
import pytest
from tiny import get_config, settings

from jpt.training.run import train_model

STEPS, EVERY = 30, 10
CONFIG = processes.ROOT / 'tests' / 'training' / 'tiny.py'
FLAGS = (
    f'--config.steps={STEPS}',
    f'--config.checkpoint.every={EVERY}',
    '--config.checkpoint.keep=9',
    '--config.checkpoint.export=True',
)
DIVIDED = ('--config.mesh.data=1', '--config.mesh.fsdp=2')  # each process holds half of every matrix


def losses(workdir, first=1, last=STEPS):
    """[loss] from step `first` to the `last` one; a step that stands there twice, or not at all, is an error."""
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    found = [(row['step'], row['loss']) for row in rows if 'loss' in row]
    assert [step for step, _ in found] == list(range(found[0][0], last + 1))
    return [loss for step, loss in found if step >= first]


def count_rows(workdir):
    path = workdir / 'metrics.jsonl'
    return len(path.read_bytes().splitlines()) if path.exists() else 0


class Runs:
    """Starts jobs of two processes in a folder and ends them all."""

    def __init__(self, folder):
        self.folder, self.jobs = folder, []
        get_config(str(folder))  # writes the text

    def start(self, name):
        workdir = self.folder / name
        self.jobs.append(processes.start_training(f'{CONFIG}:{self.folder}', workdir, *FLAGS, *DIVIDED))
        return workdir, self.jobs[-1]


def succeed(job):
    results = [job.result(index) for index in range(2)]
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    return [out for _, out, _ in results]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp('two'))
    yield found
    for job in found.jobs:
        job.kill()


@pytest.fixture(scope='module')
def whole(runs):
    """The workdir of an uninterrupted run."""
    workdir, job = runs.start('whole')
    outs = succeed(job)
    assert outs[0].startswith('process 0 of 2, devices [')
    assert 'step' not in outs[1]  # process 0 alone reports
    return workdir


def one_process(tmp_path, whole, step):
    """The losses of one process, on eight devices, that goes on where two stopped."""
    if step:
        shutil.copytree(whole / 'checkpoints' / str(step), tmp_path / 'run' / 'checkpoints' / str(step))
    changes = {'steps': STEPS, 'checkpoint': {'every': 100, 'export': True}}
    train_model(settings(tmp_path, **changes), tmp_path / 'run')
    return tmp_path / 'run'


def test_two_processes_train_to_the_losses_of_one(whole, tmp_path):
    alone = losses(one_process(tmp_path, whole, 0))
    assert alone[-1] < alone[0] - 1
    np.testing.assert_allclose(losses(whole), alone, rtol=1e-5)


def test_killed_and_asked_to_stop_they_go_on_to_the_very_same_numbers(runs, whole):
    shutil.copytree(whole / 'compilation_cache', runs.folder / 'broken' / 'compilation_cache')
    workdir, job = runs.start('broken')
    assert job.wait_for(lambda: (workdir / 'checkpoints' / str(EVERY)).exists()), job.result(0)
    job.kill()  # SIGKILL to both
    rows = count_rows(workdir)
    assert rows < STEPS
    _, job = runs.start('broken')
    assert job.wait_for(lambda: count_rows(workdir) > max(EVERY + 2, rows)), job.result(0)
    job.send(signal.SIGTERM, 1)  # one of them is asked
    results = [job.result(index) for index in range(2)]
    assert [code for code, _, _ in results] == [143, 143], results[0][2] + results[1][2]
    assert f'resuming at step {EVERY}' in results[0][1]
    assert 'asked to stop (SIGTERM to one of its processes): saved step' in results[0][1]
    _, job = runs.start('broken')
    assert 'resuming at step' in succeed(job)[0]
    assert losses(workdir) == losses(whole)
    weights = [folder / 'model' / 'model.safetensors' for folder in (workdir, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_one_process_restores_what_two_saved(whole, tmp_path):
    np.testing.assert_allclose(
        losses(one_process(tmp_path, whole, EVERY), EVERY + 1), losses(whole, EVERY + 1), rtol=1e-5
    )


def test_two_processes_export_what_one_does(whole, tmp_path):
    """The last checkpoint of two, opened and exported by one: the same files, bit for bit."""
    alone = one_process(tmp_path, whole, STEPS) / 'model'
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in (whole / 'model').iterdir())
    for name in names:
        assert (alone / name).read_bytes() == (whole / 'model' / name).read_bytes(), name


@pytest.mark.parametrize(
    'axis', ['pipe', *(pytest.param(axis, marks=pytest.mark.full) for axis in ('data', 'tensor', 'context'))]
)
def test_any_axis_may_cross_processes(runs, tmp_path, axis):
    """A step's collectives, a save and an export, whatever is divided; losses to the rounding of another order."""
    workdir, steps = runs.folder / axis, 4
    mesh = tuple(f'--config.mesh.{name}={size}' for name, size in {'data': 1, axis: 2}.items())
    job = processes.start_training(f'{CONFIG}:{runs.folder}', workdir, *FLAGS, f'--config.steps={steps}', *mesh)
    runs.jobs.append(job)
    succeed(job)
    train_model(settings(tmp_path, steps=steps), tmp_path / 'run')
    np.testing.assert_allclose(losses(workdir, last=steps), losses(tmp_path / 'run', last=steps), rtol=1e-5)
    assert (workdir / 'model' / 'model.safetensors').exists()
