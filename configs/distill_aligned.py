"""Distil a teacher into a student with another tokenizer: from the words that both have, where both begin one.

Name both after the config: --config=configs/distill_aligned.py:STUDENT,TEACHER --config.data.paths="('train.jsonl',)".
Each directory has a tokenizer of its own; the data are texts or conversations, not token files. What nothing of the
teacher is aligned with learns from labels, so cross-entropy has a share. See docs/distill.md, "Another tokenizer".
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
            'distill': {'alpha': 0.5, 'alignment': {'likely': 64, 'uld': 1.0}},
            'data': {'paths': ('train.jsonl',)},
            'eval': {'every': 100},
            'batch': {'size': 64, 'length': 2048, 'microbatches': 8},
            'steps': 1000,
            'schedule': {'kind': 'cosine', 'lr': 1e-4, 'min_lr': 1e-5, 'warmup': 50},
            'compute': {'remat': 'full'},
            'checkpoint': {'every': 100},
        },
    )
