"""Training steps of published models, compiled for 8 and 16 H100 without a GPU (extra `aot`): a config, and a table.

    python -m jpt.plan --config=benchmarks/real_sizes.py:Qwen3-30B-A3B,8 --topology=8   # one of them in full
    python benchmarks/real_sizes.py                                                     # the table of docs/plan.md
    python benchmarks/real_sizes.py Qwen3-8B,16                                         # a row of it

The architectures are the published config.json files that the tests keep. A compile takes some minutes.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jpt.config import config_dict, from_config_dict
from jpt.plan import bounds_of, fits
from jpt.planned import plan_step
from jpt.sharding.topology import H100, topology_devices
from jpt.training.settings import TrainConfig

PUBLISHED = Path(__file__).parents[1] / 'tests' / 'golden' / 'published_configs.json'
LENGTH = 4096


class Row(NamedTuple):
    """A model on so many GPUs, and the axes of its mesh; one row of 4,096 tokens per GPU."""

    model: str
    gpus: int
    mesh: dict[str, int]


ROWS = (
    Row('Qwen3-30B-A3B', 8, {'expert': 4, 'fsdp': 2}),
    Row('Qwen3-30B-A3B', 16, {'expert': 8, 'fsdp': 2}),
    Row('Moonlight-16B-A3B', 8, {'expert': 4, 'fsdp': 2}),
    Row('Moonlight-16B-A3B', 16, {'expert': 8, 'fsdp': 2}),
    Row('Nemotron-H-8B-Base-8K', 8, {'fsdp': 8}),
    Row('Nemotron-H-8B-Base-8K', 16, {'fsdp': 16}),
    Row('Qwen3-8B', 8, {'fsdp': 8}),
    Row('Qwen3-8B', 16, {'fsdp': 16}),
)
BY_NAME = {f'{row.model},{row.gpus}': row for row in ROWS}


def get_config(name: str = 'Qwen3-8B,8') -> ConfigDict:
    """The training job of a row: its model and its number of GPUs, with a comma between."""
    if name not in BY_NAME:
        raise ValueError(f'benchmarks/real_sizes.py:{name}: expected one of {"; ".join(BY_NAME)}')
    row = BY_NAME[name]
    values: dict[str, Any] = {
        'task': 'sft',
        'model': {'architecture': json.loads(PUBLISHED.read_text())[row.model]['config']},
        'data': {'paths': ('train.jsonl',), 'kind': 'chat'},
        'batch': {'size': row.gpus, 'length': LENGTH},
        'optimizer': {'moments': 'bfloat16'},
        'compute': {'dtype': 'bfloat16', 'param_dtype': 'bfloat16', 'remat': 'full'},
        'mesh': {'data': 1, **row.mesh},
    }
    return config_dict(TrainConfig, values)


def line_of(name: str) -> str:
    """The row of the table, GiB and TFLOP per GPU."""
    row = BY_NAME[name]
    start = time.monotonic()
    planned = plan_step(from_config_dict(TrainConfig, get_config(name), 'config'), topology_devices(row.gpus))
    took, bounds = time.monotonic() - start, bounds_of(planned, H100)
    mesh = ' x '.join(f'{axis} {size}' for axis, size in row.mesh.items())
    sizes = [planned.parts[part] for part in ('params', 'optimizer', 'gradients', 'rest')] + [planned.total]
    numbers = [f'{size / 2**30:.1f}' for size in sizes]
    numbers += [f'{bounds.flops / 1e12:.0f}', f'{bounds.sent / 2**30:.1f}', f'{1e3 * bounds.roofline:.0f}']
    fitting = '' if fits(planned, H100) else ' (does not fit)'
    return f'| {row.model} | {row.gpus} | {mesh}{fitting} | {" | ".join(numbers)} | {took:.0f} |'


if __name__ == '__main__':
    jax.config.update('jax_platforms', 'cpu')
    titles = (
        'model',
        'GPUs',
        'mesh',
        'parameters',
        'moments',
        'gradients',
        'temporaries',
        'in all',
        'TFLOP',
        'sent',
        'ms',
    )
    print(f'| {" | ".join((*titles, "compile, s"))} |\n| --- | ---: | --- |{" ---: |" * 9}')
    for name in sys.argv[1:] or BY_NAME:
        print(line_of(name), flush=True)
    print(f'\njax {jax.__version__}')
