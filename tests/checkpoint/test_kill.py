"""kill -9 while checkpoints are written: what was finished stays the newest, and is whole."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import entries

from jpt.checkpoint.manager import CheckpointManager

# Saves states whose every number is the step, and says which saves are finished.
SAVER = """
import sys
import numpy as np
from jpt.checkpoint.manager import CheckpointManager

with CheckpointManager(sys.argv[1], max_to_keep=2) as manager:
    restored = manager.latest_step()
    first = 0 if restored is None else restored + 1
    for step in range(first, 10**6):
        state = {f'leaf{n}': np.full((200, 1000), step, np.float32) for n in range(4)} | {'step': step}
        manager.save(step, state, data={'next': step + 1})
        if step > first:
            print(step - 1, flush=True)
"""
KILLS = int(os.environ.get('JPT_KILLS', '2'))  # more of them by hand


def start(directory: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    return subprocess.Popen(
        [sys.executable, '-c', SAVER, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def kill_in_the_middle(directory: Path, chance: random.Random) -> int:
    """Kills a saver somewhere between two of its messages; the last step that it called finished."""
    process = start(directory)
    assert process.stdout is not None
    for _ in range(chance.randint(1, 3)):
        finished = int(process.stdout.readline())
    # The place inside a save is chosen by what lies on disk, not by a clock: so many of its files are there.
    wanted, tries = chance.randint(0, 12), 0
    while tries < 2000 and sum(map(entries, directory.glob('*tmp*'))) < wanted:
        tries += 1
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return max([finished, *map(int, rest)])


def test_the_newest_checkpoint_survives_every_kill(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(KILLS):
        finished = kill_in_the_middle(tmp_path, chance)
        with CheckpointManager(tmp_path) as manager:
            restored = manager.restore()
        assert restored.step >= finished
        assert restored.data == {'next': restored.step + 1}
        assert restored.state.pop('step') == restored.step
        for leaf in restored.state.values():
            assert np.all(leaf == restored.step)


@pytest.mark.parametrize('name', ['2.orbax-checkpoint-tmp', '2.orbax-checkpoint-tmp-17'])
def test_leftovers_of_a_kill_are_removed(tmp_path: Path, name: str) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {'x': np.ones(3)})
    (tmp_path / name / 'state').mkdir(parents=True)
    (tmp_path / name / 'state' / 'half').write_bytes(b'x')
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 1
        manager.save(2, {'x': np.ones(3)})
        manager.wait()
        assert manager.all_steps() == [1, 2]
    assert not (tmp_path / name).exists()
