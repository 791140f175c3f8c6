"""Training steps compiled for eight H100 without a GPU (extra `aot`): what each mesh sends, and what Qwen3-8B needs.

    python benchmarks/plans.py collectives   # a tiny model on a dozen meshes
    python benchmarks/plans.py memory        # configs/qwen3_8b.py in several layouts

Each prints a table in Markdown, which is what docs/sharding.md and docs/plan.md show.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import jax

from jpt.config import config_dict, from_config_dict
from jpt.plan import fits, idle_share
from jpt.planned import Planned, plan_step
from jpt.sharding.audit import summed
from jpt.sharding.topology import H100, topology_devices
from jpt.training.settings import TrainConfig
from jpt.training.xla_flags import set_xla_flags

CONFIGS = Path(__file__).parents[1] / 'configs'
# Every size differs from every other, so that an array says what it is; 1,003 words are padded to what divides them.
ARCHITECTURE = {
    'model_type': 'qwen3',
    'vocab_size': 1003,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 4,
    'num_attention_heads': 8,
    'num_key_value_heads': 8,
    'head_dim': 16,
    'max_position_embeddings': 512,
    'tie_word_embeddings': False,
}
MIXTURE = {
    **ARCHITECTURE,
    'model_type': 'qwen3_moe',
    'moe_intermediate_size': 48,
    'num_experts': 32,
    'num_experts_per_tok': 4,
}
LENGTH = 128
MESHES: tuple[dict[str, int], ...] = (
    {'data': 8},
    {'fsdp': 8},
    {'tensor': 8},
    {'context': 8},
    {'pipe': 4, 'data': 2},
    {'data': 2, 'fsdp': 4},
    {'data': 2, 'tensor': 4},
    {'fsdp': 4, 'tensor': 2},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
    {'context': 2, 'tensor': 4},
    {'data': 2, 'context': 2, 'fsdp': 2},
    {'pipe': 2, 'tensor': 4},
    {'pipe': 2, 'fsdp': 2, 'tensor': 2},
)
# Layouts of Qwen3-8B on eight GPUs: changes to configs/qwen3_8b.py.
LAYOUTS: dict[str, dict[str, Any]] = {
    'TP8': {},
    'TP8, 8 microbatches': {'batch.microbatches': 8},
    'FSDP8': {'mesh.tensor': 1, 'mesh.fsdp': 8},
    'PP2 x TP4, 8 microbatches': {'mesh.pipe': 2, 'mesh.tensor': 4, 'batch.microbatches': 8},
}


def tiny(
    mesh: dict[str, int],
    microbatches: int = 1,
    rows: int = 16,
    architecture: dict[str, Any] = ARCHITECTURE,
    quantize: dict[str, Any] | None = None,
    **compute: Any,
) -> Planned:
    """The compiled step of a tiny model on eight H100; rows of one microbatch."""
    values = {
        'task': 'sft',
        'model': {'architecture': architecture},
        'data': {'paths': ('talk.jsonl',), 'kind': 'chat'},
        'batch': {'size': rows * microbatches, 'length': LENGTH, 'microbatches': microbatches},
        'compute': {'dtype': 'bfloat16', 'remat': 'full', **compute},
        'mesh': {'data': 1, **mesh},
        **({} if quantize is None else {'quantize': quantize}),
    }
    return plan_step(from_config_dict(TrainConfig, config_dict(TrainConfig, values), 'config'), topology_devices(8))


def qwen3_8b(changes: dict[str, Any]) -> Planned:
    """The compiled step of configs/qwen3_8b.py on eight H100, with changes by the names of the fields."""
    config = runpy.run_path(str(CONFIGS / 'qwen3_8b.py'))['get_config']()
    config.update_from_flattened_dict(changes)
    return plan_step(from_config_dict(TrainConfig, config, 'config'), topology_devices(8), with_buffers=True)


def name_of(mesh: dict[str, int]) -> str:
    """'data=2 fsdp=4'."""
    return ' '.join(f'{axis}={size}' for axis, size in mesh.items())


def print_collectives() -> None:
    """A row for each mesh: its collectives, by axes, with dtype and how often a step runs them."""
    print('| mesh | collectives of a step: kind, dtype, over which axes, how often |\n| --- | --- |')
    for mesh in MESHES:
        planned = tiny(mesh, microbatches=4 if 'pipe' in mesh else 1)
        rows = summed(planned.traffic, dict(planned.job.mesh.shape))
        text = '; '.join(f'{row.kind} {row.dtype} {row.axes} x {row.times}' for row in rows)
        print(f'| {name_of(mesh)} | {text} |', flush=True)


def print_memory() -> None:
    """A row for each layout of Qwen3-8B: GiB of an H100 by part."""
    print(set_xla_flags('overlap'))
    print('| layout | parameters | moments | gradients | temporaries | in all | bubbles |')
    print('| --- | ---: | ---: | ---: | ---: | ---: | ---: |')
    for name, changes in LAYOUTS.items():
        planned = qwen3_8b(changes)
        if not fits(planned, H100):
            name += ' (does not fit)'
        sizes = [planned.parts[part] for part in ('params', 'optimizer', 'gradients', 'rest')] + [planned.total]
        row = ' | '.join(f'{size / 2**30:.2f}' for size in sizes)
        print(f'| {name} | {row} | {100 * idle_share(planned.job):.1f} % |', flush=True)
    print(f'\njax {jax.__version__}')


if __name__ == '__main__':
    tables = {'collectives': print_collectives, 'memory': print_memory}
    if len(sys.argv) != 2 or sys.argv[1] not in tables:
        sys.exit(f'expected one of {", ".join(tables)}')
    tables[sys.argv[1]]()
