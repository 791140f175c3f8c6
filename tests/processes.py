"""Starts several real processes of one job on CPU, for tests; run as a script it is one of these processes.

python processes.py COORDINATOR COUNT ID WORKDIR TASK: `train` takes a few steps of a tiny model on a mesh over all
processes and prints its losses; `quantized` loads WORKDIR/model on such a mesh, saves and exports it; any other task is
a fault that process 1 (or, with `coordinator-`, process 0) has at step 3 of an endless job: `killed`, `stopped`,
`stuck`, `raises`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOST_AFTER, STUCK_AFTER = 20.0, 90.0  # generous: on a busy machine a process takes long to start


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def environment() -> dict[str, str]:
    """One CPU device per process, and the test suite's compilation cache."""
    quick = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.pytest_cache' / 'jax'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.05',
    }
    return {**os.environ, **cache, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': quick, 'PYTHONPATH': str(ROOT)}


def entries(folder: pathlib.Path) -> int:
    """Files and folders below a folder that others write to: one that goes away meanwhile is passed over."""
    return sum(len(folders) + len(names) for _, folders, names in os.walk(folder))


class Job:
    """The running processes of one job, one for each command."""

    def __init__(self, commands: Sequence[Sequence[str]]):
        self.running = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in commands
        ]

    def result(self, index: int, timeout: float = 600) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a process, once it has ended."""
        out, err = self.running[index].communicate(timeout=timeout)
        return self.running[index].returncode, out, err

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Looks again and again until something has happened, or process 0 has ended; whether it had happened."""
        while not happened():
            try:
                self.running[0].wait(0.01)
            except subprocess.TimeoutExpired:
                continue
            return happened()
        return True

    def send(self, number: signal.Signals, *indices: int) -> None:
        for index in indices or range(len(self.running)):
            self.running[index].send_signal(number)

    def kill(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


def start_task(workdir: pathlib.Path, task: str, count: int = 2) -> Job:
    """Processes of this very file that do a task together."""
    coordinator = f'127.0.0.1:{free_port()}'
    return Job([[__file__, coordinator, str(count), str(index), str(workdir), task] for index in range(count)])


def start_training(config: str, workdir: pathlib.Path, *flags: str, count: int = 2) -> Job:
    """`python -m jpt.train` as a user starts it: `count` processes, or one that knows of no others."""
    command = ['-m', 'jpt.train', f'--config={config}', f'--workdir={workdir}']
    if count == 1:
        return Job([[*command, *flags]])
    joined = ['enabled=True', f'coordinator=127.0.0.1:{free_port()}', f'num_processes={count}']
    joined += ['lost_after=600']  # no fault is expected, and the machine may be busy
    command += [f'--config.multihost.{setting}' for setting in joined]
    return Job([[*command, f'--config.multihost.process_id={index}', *flags] for index in range(count)])


def train(devices: list[Any] | None = None) -> list[float]:
    """Losses of three steps of gradient descent on a tiny model, on a mesh over all devices, or over those given."""
    import jax
    import numpy as np

    from jpt.data.batch import Batch
    from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
    from jpt.models.transformer import init
    from jpt.sharding.grads import loss_and_grads
    from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
    from jpt.sharding.plan import make_plan
    from jpt.sharding.rules import shardings
    from jpt.training.objective import language_modeling

    cfg = ModelConfig('llama', 31, 8, 2, 1, 4, (Segment((LayerKind(Rope(), None, 16),), 2),), 32)
    random = np.random.default_rng(0)
    ids = random.integers(0, 31, (2, 4, 8), dtype=np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    mask = (random.random((4, 8)) < 0.7).astype(np.float32)
    batch = Batch(ids[0], ids[1], mask, positions, np.ones_like(positions))

    mesh = make_mesh(MeshConfig(data=-1), devices)
    shapes = jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    none = {'model': jax.tree.map(lambda _: None, params)}
    plan = make_plan(mesh, {'model': cfg}, params, none)

    def place(tree, places):
        return jax.tree.map(
            lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index]), tree, places
        )

    @jax.jit
    def step(params, batch):
        total, grads, _ = loss_and_grads(language_modeling(cfg, Compute()), params, none, batch, plan)
        return total, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    params, batch = place(params, shardings(mesh, plan.specs)), place(batch, batch_shardings(mesh, batch))
    losses = []
    for _ in range(3):
        total, params = step(params, batch)
        losses.append(float(total))
    return losses


def copy_quantized(workdir: str) -> None:
    """A model whose matrices lie in halves, one in each process, saved and exported."""
    import jpt
    from jpt.sharding.mesh import MeshConfig, make_mesh

    model = jpt.load(f'{workdir}/model', mesh=make_mesh(MeshConfig(data=1, fsdp=-1)))
    model.save(f'{workdir}/saved')
    model.export(f'{workdir}/exported')


def work_until_the_end(process: int, count: int, workdir: str, task: str) -> None:
    """An endless job in which every step needs all processes, under a watchdog; one of them has a fault at step 3."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
    from jpt.sharding.watchdog import Watchdog

    mesh = make_mesh(MeshConfig(data=-1))
    ones = np.ones((count, 1), np.float32)
    at_fault = process == (0 if task.startswith('coordinator-') else 1)
    with Watchdog(workdir, process, count, lost_after=LOST_AFTER, stuck_after=STUCK_AFTER) as watchdog:
        x = jax.make_array_from_callback(ones.shape, batch_shardings(mesh, ones), lambda index: ones[index])
        total = jax.jit(jnp.sum)
        for step in range(10**9):
            watchdog.beat(step, 'data')
            if step == 3 and at_fault:
                fault(task.removeprefix('coordinator-'))
            watchdog.beat(step, 'step')
            float(total(x))


def fault(task: str) -> None:
    if task == 'raises':
        raise ValueError('malformed line 17')
    if task == 'stuck':
        threading.Event().wait()
    os.kill(os.getpid(), {'killed': signal.SIGKILL, 'stopped': signal.SIGSTOP}[task])


def main(coordinator: str, count: str, process: str, workdir: str, task: str) -> None:
    from jpt.sharding.multihost import MultihostConfig, describe_process, join_processes

    config = MultihostConfig(
        enabled=True,
        coordinator=coordinator,
        num_processes=int(count),
        process_id=int(process),
        initialization_timeout=120,
        lost_after=LOST_AFTER,
        stuck_after=STUCK_AFTER,
    )
    join_processes(config)
    print(describe_process(), flush=True)
    if task == 'train':
        print(json.dumps(train()), flush=True)
    elif task == 'quantized':
        copy_quantized(workdir)
    else:
        work_until_the_end(int(process), int(count), workdir, task)


if __name__ == '__main__':
    main(*sys.argv[1:])
