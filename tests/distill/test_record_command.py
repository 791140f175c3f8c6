"""python -m jpt.distill.record as a user starts it: killed in a part and begun again, by several processes, and then
python -m jpt.train on what it wrote."""

import json
import re
import signal
import subprocess
import sys

import processes
import pytest
import recorded

COMMAND = ['-m', 'jpt.distill.record', f'--config={recorded.ROOT / "tests" / "distill" / "recorded.py"}']
# The process dies after a part's bytes are written, before the part has its name.
KILLED = """
import os, runpy, signal, sys
calls = 0

def fsync(file):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A teacher, and texts of several windows."""
    found = tmp_path_factory.mktemp('command')
    recorded.export_teacher(found / 'teacher')
    recorded.write_texts(found / 'text.txt', recorded.TEXTS * 3)
    return found


def command(folder, output, *flags):
    """A window takes the documents of about eight rows; documents that come again are recorded again."""
    config = f'{COMMAND[2]}:{folder}'
    return [*COMMAND[:2], config, f'--output={output}', '--config.data.window_rows=8', *flags]


def run(arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=processes.ROOT, env=processes.environment(), capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def whole(folder):
    """What one process writes that nothing disturbs."""
    done = run(command(folder, folder / 'whole'))
    assert done.returncode == 0, done.stderr
    assert 'tokens/s' in done.stdout
    assert f'saved    {folder / "whole"}' in done.stdout
    return folder / 'whole'


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_recording_that_is_killed_goes_on_and_ends_with_the_same_bytes(folder, whole):
    output = folder / 'killed'
    done = run(['-c', KILLED, *command(folder, output)[1:]])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((output / 'manifest.json').read_text())['parts'] is None
    left = {path.name for path in output.iterdir()}
    assert {'train-00002.array_record', '.train-00003.array_record.incomplete'} <= left
    assert 'train-00003.array_record' not in left
    flags = [f'--config.distill.targets={output}', f'--workdir={folder / "early"}']
    early = run(['-m', 'jpt.train', command(folder, output)[2], *flags])
    assert early.returncode == 1
    assert 'the recording is not complete: the command that began it goes on from there' in early.stderr
    again = run(command(folder, output))
    assert again.returncode == 0, again.stderr
    assert 'train: 3 parts are there' in again.stdout
    assert content(output) == content(whole)
    assert len(content(whole)) > 5
    settled = run(command(folder, output))
    assert 'complete already' in settled.stdout


def test_two_processes_write_what_one_writes(folder, whole):
    output = folder / 'two'
    joined = ['enabled=True', f'coordinator=127.0.0.1:{processes.free_port()}', 'num_processes=2', 'lost_after=600']
    flags = [f'--config.multihost.{setting}' for setting in joined]
    job = processes.Job([command(folder, output, *flags, f'--config.multihost.process_id={i}') for i in range(2)])
    for index in range(2):
        code, _, err = job.result(index)
        assert code == 0, err
    one, other = (json.loads((place / 'manifest.json').read_text()) for place in (whole, output))
    sums, others = (each['parts']['train'].pop('sums') for each in (one, other))
    assert sums == pytest.approx(others, rel=1e-3)
    assert [part['file'] for part in one['parts'].pop('train')['parts']] == [
        part['file'] for part in other['parts'].pop('train')['parts']
    ]
    assert one == other


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [1, 2]
    assert all(0 < row['tail'] < 1 and 0 < row['student_tail'] < 1 and row['kl'] > 0 for row in rows)
    return [row['loss'] for row in rows]


def test_training_reads_what_was_recorded_on_one_host_and_on_two(folder, whole):
    config = command(folder, whole)[2]
    flags = [f'--config.distill.targets={whole}', '--config.batch.size=4', '--config.distill.alpha=0.5']
    done = run(['-m', 'jpt.train', config, f'--workdir={folder / "run"}', *flags])
    assert done.returncode == 0, done.stderr
    assert f'targets  the 8 likeliest words of {folder / "teacher"}, float16, in {whole}' in done.stdout
    assert 'teacher ' not in done.stdout.replace(str(folder), '')
    job = processes.start_training(config.removeprefix('--config='), folder / 'run2', *flags)
    for index in range(2):
        code, _, err = job.result(index)
        assert code == 0, err
    assert losses(folder / 'run2') == pytest.approx(losses(folder / 'run'), rel=1e-5)


def test_rows_that_are_cut_elsewhere_end_the_run_with_the_document(folder, whole):
    flags = ['--config.data.packing=concat', f'--config.distill.targets={whole}', f'--workdir={folder / "other"}']
    refused = run(['-m', 'jpt.train', command(folder, whole)[2], *flags])
    assert refused.returncode == 1
    assert re.search(r'jpt.train: .*text.txt: byte \d+: positions .* student sees', refused.stderr)
