"""Supervised tuning of a model of Qwen3-8B's shape on eight H100: the job that the plan page compiles ahead of time.

Name the checkpoint after the config, and your conversations: --config=configs/qwen3_8b.py:DIR
--config.data.paths="('train.jsonl',)". Without a checkpoint the weights are random, which is enough for jpt.plan. Other
meshes: --config.mesh.fsdp=8 --config.mesh.tensor=1, or --config.mesh.pipe=2 --config.mesh.tensor=4
--config.batch.microbatches=8.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QWEN3_8B
from jpt.training.settings import TrainConfig


def get_config(checkpoint: str = '') -> ConfigDict:
    """Settings of the run, from a checkpoint's directory or from random weights."""
    return config_dict(
        TrainConfig,
        {
            'task': 'sft',
            'model': {'path': checkpoint} if checkpoint else {'architecture': QWEN3_8B},
            'data': {'paths': ('train.jsonl',), 'kind': 'chat', 'long_documents': 'truncate'},
            'batch': {'size': 8, 'length': 4096},
            'steps': 1000,
            'optimizer': {'moments': 'bfloat16'},
            'schedule': {'kind': 'cosine', 'lr': 1e-5, 'min_lr': 1e-6, 'warmup': 30},
            'compute': {'dtype': 'bfloat16', 'remat': 'full', 'xla_flags': 'overlap'},
            'mesh': {'data': 1, 'tensor': 8},
        },
    )
