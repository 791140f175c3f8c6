"""Distil a model of Qwen3-8B's shape into one of half its layers on eight H100, from the teacher's full logits.

Name the teacher after the config, and your text: --config=configs/distill_qwen3.py:DIR
--config.data.paths="('train.jsonl',)". The student begins with every second layer of its teacher, so that it recovers
what these knew together. The numbers are those of published recipes: forward KL alone, temperature 1, 768 rows of 4,096
tokens, learning rate from 1e-4 to 1e-5. Without a directory the file describes the job by its numbers, for jpt.plan.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QWEN3_8B
from jpt.training.settings import TrainConfig

LAYERS = tuple(range(1, 36, 2))


def get_config(teacher: str = '') -> ConfigDict:
    """Settings of the run, from a teacher's directory or from its shape."""
    student = {'path': teacher, 'layers': LAYERS}
    shape = {'architecture': QWEN3_8B | {'num_hidden_layers': len(LAYERS)}}
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': student if teacher else shape,
            'teacher': {'path': teacher} if teacher else {'architecture': QWEN3_8B},
            'distill': {'forward_kl': 1.0, 'alpha': 1.0, 'temperature': 1.0},
            'data': {'paths': ('train.jsonl',)},
            'batch': {'size': 768, 'length': 4096, 'microbatches': 96},
            'steps': 1000,
            'optimizer': {'moments': 'bfloat16'},
            'schedule': {'kind': 'cosine', 'lr': 1e-4, 'min_lr': 1e-5, 'warmup': 50},
            'compute': {'dtype': 'bfloat16', 'remat': 'full', 'xla_flags': 'fsdp'},
            'mesh': {'data': 1, 'fsdp': 8},
            'checkpoint': {'every': 100},
        },
    )
