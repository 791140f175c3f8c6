"""See a training step before a GPU is touched: `python -m jpt.plan --config=configs/x.py --topology=8`.

Compiles the step ahead of time for so many GPUs, on a machine that has none (extra `aot`), and prints bytes per device
by part, the collectives with their bytes, operations, and what the hardware allows at best.
"""

import json
import sys
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jpt.config import from_config_dict
from jpt.sharding.audit import Collective, collectives, sent_bytes, table
from jpt.sharding.topology import CHIPS, Chip, topology_devices
from jpt.training.job import Job, make_job
from jpt.training.memory import bytes_per_device, gib
from jpt.training.overview import flops_of, overview
from jpt.training.settings import TrainConfig


class Planned(NamedTuple):
    """A compiled step and what it needs; bytes are per device."""

    job: Job
    hlo: str
    state: int  # parameters, optimizer, frozen weights: there between steps
    temporary: int  # gradients, activations and buffers, at their peak within a step
    program: int
    traffic: list[Collective]

    @property
    def total(self) -> int:
        return self.state + self.temporary + self.program


def define_flags() -> Any:
    """The command line; returns the holder of the config."""
    flags.DEFINE_integer('topology', 8, 'How many GPUs: 1 to 8, or a multiple of 8.')
    flags.DEFINE_enum('chip', 'h100', sorted(CHIPS), 'Which GPU.')
    flags.DEFINE_bool('json', False, 'Print the numbers as one line of JSON at the end.')
    return config_flags.DEFINE_config_file('config', None, 'A file of configs/, with a function get_config().')


def plan_step(config: TrainConfig, devices: list[Any]) -> Planned:
    """Compiles the training step of a job for devices that need not be here.

    Raises:
        ValueError: settings that do not hold, or do not fit the devices.
    """
    job = make_job(config, devices)
    shape = (config.batch.size, config.batch.length)
    batch = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where), job.batch, job.batch_shardings
    )
    compiled = job.step.lower(job.state, batch).compile()
    memory = compiled.memory_analysis()
    hlo = compiled.as_text()
    return Planned(
        job,
        hlo,
        bytes_per_device(job.state),
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        collectives(hlo),
    )


def largest(job: Job, count: int = 8) -> list[tuple[str, int]]:
    """The leaves of the state that take most bytes of a device, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(job.state)
    sizes = [(jax.tree_util.keystr(path), bytes_per_device(leaf)) for path, leaf in leaves]
    return sorted(sizes, key=lambda row: -row[1])[:count]


def describe(planned: Planned, chip: Chip) -> str:
    """The plan as text."""
    job = planned.job
    tokens = job.config.batch.size * job.config.batch.length
    flops = flops_of(job) * tokens / job.mesh.size
    sent = sent_bytes(planned.traffic)
    times = {'products': flops / chip.bfloat16, 'collectives': sent / chip.link}
    bound = max(times.values())
    fits = planned.total <= chip.memory
    verdict = 'fits' if fits else 'DOES NOT FIT'
    lines = [
        overview(job),
        '',
        f'per device, compiled for {job.mesh.size} x {chip.name}:',
        f'  state                {gib(planned.state):>14}   parameters, optimizer, frozen weights',
        f'  temporary            {gib(planned.temporary):>14}   gradients, activations, buffers at their peak',
        f'  program              {gib(planned.program):>14}',
        f'  in all               {gib(planned.total):>14}   of {gib(chip.memory)}: {verdict}',
        '',
        table(planned.traffic) if planned.traffic else '  no collectives',
        '',
        f'operations             {flops / 1e12:12.3f} TFLOP per device and step (formula: jpt/training/flops.py)',
        f'products at best       {1e3 * times["products"]:12.3f} ms at {chip.bfloat16 / 1e12:.0f} TFLOP/s',
        f'collectives at best    {1e3 * times["collectives"]:12.3f} ms, {gib(int(sent))} at {chip.link / 1e9:.0f} GB/s',
        f'roofline               {1e3 * bound:12.3f} ms per step, {tokens / bound:,.0f} tokens/s on all devices',
    ]
    if not fits:
        lines += ['', 'largest tensors of the state:']
        lines += [f'  {gib(size):>14}  {name}' for name, size in largest(job)]
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    """Prints the plan; the exit status is 1 where it does not fit."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    chip = CHIPS[given.chip]
    try:
        config = from_config_dict(TrainConfig, given.config, 'config')
        planned = plan_step(config, topology_devices(given.topology, chip))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f'jpt.plan: {error}')
    print(describe(planned, chip))
    if given.json:
        numbers = {
            'state': planned.state,
            'temporary': planned.temporary,
            'total': planned.total,
            'memory': chip.memory,
            'collectives': [item._asdict() for item in planned.traffic],
        }
        print(json.dumps(numbers))
    sys.exit(0 if planned.total <= chip.memory else 1)


if __name__ == '__main__':
    define_flags()
    flags.mark_flag_as_required('config')
    app.run(main)
