"""kill -9 at moments of all kinds, a save nearly always under way: a run always goes on to the very same numbers."""

import json
import os
import random
import signal

import numpy as np
import processes
import pytest
from tiny import get_config

from jpt.checkpoint.model_dir import load_model

CONFIG = processes.ROOT / 'tests' / 'training' / 'tiny.py'
STRESS = int(os.environ.get('JPT_KILLS', '14'))


def start(folder, name, steps):
    flags = [f'--config.steps={steps}', '--config.checkpoint.every=1', '--config.checkpoint.export=True']
    flags.append('--config.log.every=2')  # so that a kill falls within what a row adds up
    return processes.start_training(f'{CONFIG}:{folder}', folder / name, *flags, count=1)


def rows(workdir):
    """The rows of metrics.jsonl, without what depends on clocks."""
    text = (workdir / 'metrics.jsonl').read_text() if (workdir / 'metrics.jsonl').exists() else ''
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]
    timed = ('seconds', 'tokens_per_second', 'memory', 'eta')
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in found]


def a_moment(chance, workdir):
    """A condition on what lies on disk, not on a clock: so many rows more, or so many files of an unfinished save."""
    if chance.random() < 0.3:
        wanted = len(rows(workdir)) + chance.randint(1, 2)
        return f'{wanted} rows', lambda: len(rows(workdir)) >= wanted
    newest = max([int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()], default=0)
    later, files = newest + chance.randint(1, 3), chance.randint(0, 24)

    def writing():
        found = [path for path in workdir.glob('checkpoints/*tmp*') if int(path.name.split('.')[0]) >= later]
        return bool(found) and processes.entries(found[0]) >= files

    return f'{files} files of save {later}', lambda: writing() or (workdir / 'checkpoints' / str(later + 1)).exists()


def killed_run(folder, kills, steps):
    """Runs a job to its end although it is killed so many times; the moments of the kills, for a message."""
    chance, moments = random.Random(kills), []
    while len(moments) < kills:
        job = start(folder, 'killed', steps)
        moment, happened = a_moment(chance, folder / 'killed')
        assert job.wait_for(happened), (moment, job.result(0))
        unfinished = [path.name for path in folder.glob('killed/checkpoints/*tmp*')]
        job.kill()
        assert job.running[0].returncode == -signal.SIGKILL
        moments.append(f'{moment}, {unfinished}')
    job = start(folder, 'killed', steps)
    code, out, err = job.result(0)
    assert code == 0, err
    assert 'resuming at step' in out
    return moments


@pytest.mark.parametrize('kills', [3, pytest.param(STRESS, marks=pytest.mark.full)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_numbers(tmp_path, kills):
    get_config(str(tmp_path))  # writes the text
    steps = 4 + 5 * kills
    job = start(tmp_path, 'whole', steps)
    assert job.result(0)[0] == 0
    moments = killed_run(tmp_path, kills, steps)
    print(*moments, sep='\n')
    assert rows(tmp_path / 'killed') == rows(tmp_path / 'whole'), moments
    one, other = (load_model(tmp_path / name)[1] for name in ('killed', 'whole'))
    assert len(one) == len(other)
    for name in ('model.safetensors', 'config.json'):
        weights = [tmp_path / run / 'model' / name for run in ('killed', 'whole')]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    np.testing.assert_array_equal(one['embed']['embedding'], other['embed']['embedding'])
