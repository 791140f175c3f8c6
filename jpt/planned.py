"""A training step compiled ahead of time, on a machine that has no GPU: what it needs and what it sends."""

import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jpt.kernels.expert_parallel import LATE
from jpt.sharding.audit import BYTES, Collective, collectives
from jpt.training.job import Job, make_job
from jpt.training.memory import bytes_per_device, gradient_bytes
from jpt.training.overview import bytes_by_part
from jpt.training.settings import TrainConfig


class Buffer(NamedTuple):
    """A piece of the memory that the compiler gave to temporary arrays, and the largest array in it."""

    bytes: int
    shape: str  # as in HLO: 'bf16[36,8,4096,4096]'


class Planned(NamedTuple):
    """A compiled step and what it needs; bytes are per device."""

    job: Job
    parts: dict[str, int]  # by the names in PARTS; all but gradients and rest are there between steps
    traffic: list[Collective]
    buffers: list[Buffer]  # largest first; empty where the compiler was not asked

    @property
    def temporary(self) -> int:
        """What a step needs beside its arguments: gradients, activations and buffers, at their peak."""
        return self.parts['gradients'] + self.parts['rest']

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_step(config: TrainConfig, devices: list[Any], *, with_buffers: bool = False) -> Planned:
    """Compiles the training step of a config for devices that need not be here; see `compile_step`.

    Raises:
        ValueError: settings that do not hold, or do not fit the devices.
    """
    return compile_step(make_job(config, devices), with_buffers=with_buffers)


def compile_step(job: Job, *, with_buffers: bool = False) -> Planned:
    """Compiles the step of a job; `with_buffers` has the compiler say what fills its temporary memory."""
    batch = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), job.batch, job.batch_shardings
    )
    lowered = job.step.lower(job.state, batch)
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={'xla_dump_to': folder} if with_buffers else None)
        reports = Path(folder).glob('*jit_step*memory-usage-report.txt')
        buffers = [buffer for path in reports for buffer in read_buffers(path.read_text())]
    memory = compiled.memory_analysis()
    # Of one microbatch they are widened where they are used; a sum over several, or a pipeline's, is wide throughout.
    wide = job.config.batch.microbatches > 1 or job.plan.layouts['model'].staged
    gradients = gradient_bytes(job.state.params, wide=wide)
    parts = {**bytes_by_part(job), 'batch': bytes_per_device(batch), 'gradients': gradients}
    # Results that do not take the place of an argument are a few metrics; the state is donated.
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts['gradients'] = min(parts['gradients'], beside)
    parts['rest'] = beside - parts['gradients']
    return Planned(job, parts, collectives(without_late_rounds(compiled.as_text())), sorted(buffers, reverse=True))


def without_late_rounds(hlo: str) -> str:
    """A program without the lines of further rounds of the experts' exchange, which an even router does not run."""
    late = re.compile(rf'op_name="[^"]*\b{LATE}\b')
    return '\n'.join(line for line in hlo.splitlines() if not late.search(line))


def read_buffers(report: str) -> list[Buffer]:
    """The rows of XLA's memory usage report: bytes of a piece of memory, and the shapes that lie there in turn."""
    units = {'B': 1, 'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30}
    row = r'^\s*\S+\(\s*\d+%\);\s*([\d.]+)(B|KiB|MiB|GiB);\s*\d+;\s*\d+;\s*(.+)$'
    found = []
    for number, unit, listed in re.findall(row, report, re.MULTILINE):
        shapes = re.findall(r'\w+\[[\d,]*\]', listed)
        found.append(Buffer(int(float(number) * units[unit]), max(shapes, key=_bytes, default='')))
    return found


def _bytes(shape: str) -> int:
    """Of an array as HLO writes it: 'bf16[36,8,4096]'."""
    dtype, _, dims = shape.partition('[')
    return BYTES.get(dtype, 4) * math.prod(map(int, re.findall(r'\d+', dims)))
