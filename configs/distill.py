"""Distil any teacher into any student with its tokenizer, on text of yours, from full logits.

Name both after the config: --config=configs/distill.py:STUDENT,TEACHER --config.data.paths="('train.jsonl',)". Each is
a Hugging Face directory, a jpt checkpoint, or 'quickstart'; a student that was cut out of its teacher comes from
python -m jpt.prune. See docs/distill.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.training.settings import TrainConfig


def get_config(directories: str) -> ConfigDict:
    """Settings of the run, from directories 'STUDENT,TEACHER'."""
    given = directories.split(',')
    if len(given) != 2:
        raise ValueError(f"expected STUDENT,TEACHER, found '{directories}'")
    student, teacher = given
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'path': student},
            'teacher': {'path': teacher},
            'data': {'paths': ('train.jsonl',)},
            'eval': {'every': 100},
            'batch': {'size': 64, 'length': 2048, 'microbatches': 8},
            'steps': 1000,
            'schedule': {'kind': 'cosine', 'lr': 1e-4, 'min_lr': 1e-5, 'warmup': 50},
            'compute': {'remat': 'full'},
            'checkpoint': {'every': 100},
        },
    )
