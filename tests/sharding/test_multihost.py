"""Several real processes on CPU, joined by jax.distributed: the same losses as one, and an end when one has a fault."""

import dataclasses
import json
import os
import re
import signal
import subprocess

import jax
import numpy as np
import processes
import pytest

from jpt.data.config import DataConfig
from jpt.sharding.multihost import LAUNCHERS, MultihostConfig, join_processes
from jpt.sharding.watchdog import EXIT_CODE
from jpt.training.settings import TrainConfig

# Whether a process counts as dead or as stuck depends on how far the others saw it come; test_watchdog.py beside this
# file holds the verdicts one by one. Here it must be named, in time, by real processes.
FAULTS = {
    'killed': ['process 1'],
    'stopped': ['process 1'],
    'stuck': ['process 1', 'no progress for'],
    'raises': ['process 1 (host', 'ValueError: malformed line 17'],
}
TASKS = ('train', 'coordinator-killed', *FAULTS)


@pytest.fixture(scope='module')
def jobs(tmp_path_factory):
    """All jobs at once: most of the time they wait."""
    running = {task: processes.start_task(tmp_path_factory.mktemp(task), task) for task in TASKS}
    yield running
    for job in running.values():
        job.kill()


def test_two_processes_train_to_the_losses_of_one(jobs):
    results = [jobs['train'].result(index) for index in (0, 1)]
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    for index, (_, out, _) in enumerate(results):
        assert out.startswith(f'process {index} of 2, devices [')
    both = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert both[0] == both[1]
    alone = processes.train(jax.devices()[:1])
    np.testing.assert_allclose(both[0], alone, rtol=1e-5)
    assert alone[2] < alone[0]


def test_the_death_of_process_0_ends_the_other_at_once(jobs):
    """It is the coordinator too: JAX may see that before the watchdog does, and ends the others itself."""
    code, _, message = jobs['coordinator-killed'].result(1)
    assert code in (EXIT_CODE, -signal.SIGABRT), message
    assert 'process 0 (host' in message or 'the leader task was preempted/died' in message


@pytest.mark.parametrize('task', FAULTS)
def test_a_fault_in_one_process_ends_the_other_with_its_name(jobs, task):
    code, _, message = jobs[task].result(0)
    assert code == EXIT_CODE, message
    for word in FAULTS[task]:
        assert word in message


def test_nothing_is_joined_unless_asked():
    join_processes(MultihostConfig())
    assert jax.process_count() == 1


def test_without_a_launcher_the_place_must_be_given(monkeypatch):
    for variable in LAUNCHERS:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(RuntimeError, match=r'no launcher was recognized \(Slurm, Open MPI, Kubernetes\)'):
        join_processes(MultihostConfig(enabled=True))


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'coordinator': 'host:1'}, ['expected all three', 'num_processes=None']),
        ({'coordinator': 'host', 'num_processes': 2, 'process_id': 0}, ["coordinator='host'", 'host:port']),
        ({'initialization_timeout': 0}, ['initialization_timeout=0']),
        ({'lost_after': -1.0}, ['lost_after=-1.0', 'positive']),
        ({'stuck_after': -1.0}, ['stuck_after=-1.0']),
    ],
)
def test_settings_that_do_not_hold(fields, words):
    with pytest.raises(ValueError) as error:
        MultihostConfig(**fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize('name', ['docs/multihost.md', 'scripts/slurm.sh'])
def test_every_setting_that_the_page_and_the_script_name_exists(name):
    text = (processes.ROOT / name).read_text()
    settings = set(re.findall(r'config\.(\w+\.\w+)', text)) | set(re.findall(r'\b(multihost\.\w+)', text))
    settings.discard('multihost.md')
    assert settings
    config = dataclasses.asdict(TrainConfig(task='pretrain', model=None, data=DataConfig()))
    for setting in settings:
        group, field = setting.split('.')
        assert field in config[group], setting


@pytest.mark.parametrize(('restarts', 'again'), [('0', True), ('3', False)])
def test_the_slurm_script_starts_the_job_again_three_times(tmp_path, restarts, again):
    """srun and scontrol stand in: they write down what they are called with."""
    for command, code in (('srun', EXIT_CODE), ('scontrol', 0)):
        path = tmp_path / command
        path.write_text(f'#!/bin/bash\necho "{command} $*" >> {tmp_path}/calls\nexit {code}\n')
        path.chmod(0o755)
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': restarts}
    script = ['bash', str(processes.ROOT / 'scripts' / 'slurm.sh')]
    done = subprocess.run([*script, 'configs/a.py', 'out', '--config.steps=3'], env=environment)
    assert done.returncode == EXIT_CODE
    calls = (tmp_path / 'calls').read_text().splitlines()
    assert calls[0] == (
        'srun --kill-on-bad-exit=1 --label python -m jpt.train --config=configs/a.py --workdir=out '
        '--config.multihost.enabled=True --config.steps=3'
    )
    assert calls[1:] == (['scontrol requeue 17'] if again else [])
    assert subprocess.run(script, env=environment, stderr=subprocess.DEVNULL).returncode == 2
