"""See a training step before a GPU is touched: `python -m jpt.plan --config=configs/x.py --topology=8`.

Compiles the step ahead of time for so many GPUs, on a machine that has none (extra `aot`), and prints bytes per device
by part, the collectives with their bytes, idle time of a pipeline, operations, and what the hardware allows at best.
"""

import json
import os
import sys
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jpt.config import from_config_dict
from jpt.planned import Planned, compile_step
from jpt.sharding.audit import sent_bytes, table
from jpt.sharding.timetable import waste
from jpt.sharding.topology import CHIPS, Chip, topology_devices
from jpt.training.job import Job, make_job
from jpt.training.memory import bytes_per_device, gib, remedies
from jpt.training.overview import flops_of, overview
from jpt.training.settings import TrainConfig
from jpt.training.xla_flags import set_xla_flags

# What JAX takes of a device unless told otherwise, and the most that leaves room for the CUDA context and NCCL.
FRACTION, MOST = 0.75, 0.95
FLAG = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
PARTS = {
    'params': ('parameters', ''),
    'optimizer': ('moments', 'of the optimizer'),
    'frozen': ('frozen weights', ''),
    'average': ('moving average', 'of the parameters'),
    'batch': ('batch', ''),
    'gradients': ('gradients', 'of one microbatch in the dtype of the parameters, else in float32'),
    'rest': ('temporaries', 'activations, gathered weights, buffers, at their peak'),
}


def define_flags() -> Any:
    """The command line; returns the holder of the config."""
    flags.DEFINE_integer('topology', 8, 'How many GPUs: 1 to 8, or a multiple of 8.')
    flags.DEFINE_enum('chip', 'h100', sorted(CHIPS), 'Which GPU.')
    flags.DEFINE_bool('json', False, 'Print the numbers as one line of JSON at the end.')
    return config_flags.DEFINE_config_file('config', None, 'A file of configs/, with a function get_config().')


def idle_share(job: Job) -> float:
    """The share of a step that a device of a pipeline spends waiting, or on results that nobody uses; else 0.

    With p stages, m microbatches and v chunks per device: (p - 1) / (v m + p - 1), a little more for 1F1B where m is
    not a multiple of p.
    """
    plan = job.plan
    layout, count = plan.layouts['model'], plan.num_microbatches
    if not layout.staged:
        return 0.0
    if plan.schedule == 'gpipe':
        return (layout.pipe - 1) / (count + layout.pipe - 1)
    return waste(layout.pipe, layout.chunks, count).idle


def largest(job: Job, count: int = 5) -> list[tuple[str, int]]:
    """The leaves of the state that take most bytes of a device, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(job.state)
    sizes = [(jax.tree_util.keystr(path, simple=True, separator='/'), bytes_per_device(leaf)) for path, leaf in leaves]
    return sorted(sizes, key=lambda row: -row[1])[:count]


def fits(planned: Planned, chip: Chip) -> bool:
    """Whether the step runs in what the CUDA context and NCCL leave of a device."""
    return planned.total <= MOST * chip.memory


def verdict(planned: Planned, chip: Chip) -> str:
    """Whether the step fits, and what it takes that JAX lets it."""
    if planned.total <= FRACTION * chip.memory:
        return f'fits in the {FRACTION:.0%} that JAX takes by default'
    if fits(planned, chip):
        return f'fits with {FLAG}={MOST}; the default of {FRACTION} is {gib(int(FRACTION * chip.memory))}'
    return f'DOES NOT FIT: at most {gib(int(MOST * chip.memory))} can be had ({FLAG}={MOST})'


def describe(planned: Planned, chip: Chip) -> str:
    """The plan as text."""
    lines = [f'bytes per device, compiled for {planned.job.mesh.size} x {chip.name} by jax {jax.__version__}:']
    for name, (label, note) in PARTS.items():
        if name in planned.parts:
            lines.append(f'  {label:<16} {gib(planned.parts[name]):>12}   {note}'.rstrip())
    lines.append(f'  {"in all":<16} {gib(planned.total):>12}   of {gib(chip.memory)}: {verdict(planned, chip)}')
    if planned.buffers:
        lines += ['', 'largest pieces of it, gradients among them, and the largest array in each:']
        lines += [f'  {gib(size):>12}   {shape}' for size, shape in planned.buffers[:5]]
    if not fits(planned, chip):
        lines += ['', 'largest tensors of the state:']
        lines += [f'  {gib(size):>12}   {name}' for name, size in largest(planned.job)]
        lines += ['', *remedies(sorted(planned.parts, key=lambda name: -planned.parts[name]))]
    return '\n'.join([*lines, '', *_traffic(planned), '', *_bounds(planned, chip)])


class Bounds(NamedTuple):
    """What a step takes of a device, and the seconds that this takes at best, each for itself."""

    flops: float
    touched: int  # bytes of device memory: state and gradients, once in and out
    sent: float  # bytes to other devices
    products: float
    memory: float
    link: float

    @property
    def roofline(self) -> float:
        return max(self.products, self.memory, self.link)


def bounds_of(planned: Planned, chip: Chip) -> Bounds:
    """Operations and bytes of a step, and the time that they take at best; bubbles count as products."""
    job = planned.job
    flops = flops_of(job) * _tokens(job) / job.mesh.size
    peak = chip.bfloat16 if _narrow(job) else chip.bfloat16 / 2  # XLA multiplies float32 in TF32
    touched = 2 * sum(planned.parts.get(name, 0) for name in ('params', 'optimizer', 'average', 'gradients'))
    touched += planned.parts.get('frozen', 0)
    sent = sent_bytes(planned.traffic)
    products = flops / peak / (1 - idle_share(job))
    return Bounds(flops, touched, sent, products, touched / chip.bandwidth, sent / chip.link)


def _tokens(job: Job) -> int:
    return job.config.batch.size * job.config.batch.length


def _narrow(job: Job) -> bool:
    return job.config.compute.dtype == 'bfloat16'


def _traffic(planned: Planned) -> list[str]:
    if not planned.traffic:
        return ['collectives: none']
    title = 'collectives of a step; MiB is what one device has in the end, not what it sends:'
    lines = [title, table(planned.traffic, dict(planned.job.mesh.shape))]
    if planned.job.mesh.shape['expert'] > 1 and planned.job.models['model'].cfg.experts is not None:
        lines.append('with routers that use experts evenly: further rounds of exchange are not counted')
    return lines


def _bounds(planned: Planned, chip: Chip) -> list[str]:
    """Operations and bytes of a step, and the time that they take at best."""
    job, bounds = planned.job, bounds_of(planned, chip)
    idle = idle_share(job)
    lines = []
    if job.plan.layouts['model'].staged:
        layout = job.plan.layouts['model']
        setting = f'{layout.pipe} stages, {job.plan.num_microbatches} microbatches'
        setting += f', {layout.chunks} chunks per device' if layout.chunks > 1 else ''
        lines.append(f'pipeline bubbles       {100 * idle:12.1f} %     of a step ({job.plan.schedule}, {setting})')
    note = f'{"bfloat16" if _narrow(job) else "TF32"}, ' + ('bubbles included' if idle else 'nothing recomputed')
    peak = chip.bfloat16 if _narrow(job) else chip.bfloat16 / 2
    return [
        *lines,
        f'operations             {bounds.flops / 1e12:12.3f} TFLOP per device and step '
        '(formula: jpt/training/flops.py)',
        f'products at best       {1e3 * bounds.products:12.3f} ms    at {peak / 1e12:.0f} TFLOP/s: {note}',
        f'memory at best         {1e3 * bounds.memory:12.3f} ms    {gib(bounds.touched)} at '
        f'{chip.bandwidth / 1e9:,.0f} GB/s: state and gradients, once in and out',
        f'collectives at best    {1e3 * bounds.link:12.3f} ms    {gib(int(bounds.sent))} sent by each device '
        f'at {chip.link / 1e9:.0f} GB/s, nothing overlapped',
        f'roofline               {1e3 * bounds.roofline:12.3f} ms    per step, the longest; '
        f'{_tokens(job) / bounds.roofline:,.0f} tokens/s',
    ]


def main(argv: list[str]) -> None:
    """Prints the plan; the exit status is 1 where it does not fit."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)
    jax.config.update('jax_platforms', 'cpu')  # a GPU that is here is left alone, one that is not is not looked for
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'  # what the compiler warns of here, the plan says itself
    given = flags.FLAGS
    chip = CHIPS[given.chip]
    try:
        config = from_config_dict(TrainConfig, given.config, 'config')
        if config.compute.xla_flags is not None:  # as the run will have them: some cost memory
            print(set_xla_flags(config.compute.xla_flags))
        job = make_job(config, topology_devices(given.topology, chip))
        print(overview(job))
        print(f'\ncompiling for {given.topology} x {chip.name}: half a minute to some minutes ...', flush=True)
        start = time.monotonic()
        planned = compile_step(job, with_buffers=True)
        print(f'compiled in {time.monotonic() - start:.0f} s\n')
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(f'jpt.plan: {error}')
    print(describe(planned, chip))
    if given.json:
        numbers = {
            'parts': planned.parts,
            'total': planned.total,
            'memory': chip.memory,
            'idle': idle_share(job),
            'largest': [tuple(buffer) for buffer in planned.buffers[:5]],
            'collectives': [item._asdict() for item in planned.traffic],
        }
        print(json.dumps(numbers))
    sys.exit(0 if fits(planned, chip) else 1)


if __name__ == '__main__':
    define_flags()
    flags.mark_flag_as_required('config')
    app.run(main)
