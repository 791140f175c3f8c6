"""Distil any teacher into any student, on text of yours: from full logits, or from the words that two tokenizers share.

Name both after the config: --config=configs/distill.py:STUDENT,TEACHER --config.data.paths="('train.jsonl',)". Each is
a Hugging Face directory, a jpt checkpoint, or 'quickstart'; a student that was cut out of its teacher comes from
python -m jpt.prune. Where the teacher has another tokenizer: configs/distill.py:STUDENT,TEACHER,aligned. What is then
aligned with nothing of the teacher learns from labels, so cross-entropy has a share. See docs/distill.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.training.settings import TrainConfig


def get_config(directories: str) -> ConfigDict:
    """Settings of the run, from directories 'STUDENT,TEACHER', or with ',aligned' for a teacher with other words."""
    student, _, rest = directories.partition(',')
    teacher, _, aligned = rest.partition(',')
    if not (student and teacher) or aligned not in ('', 'aligned'):
        raise ValueError(f'configs/distill.py:{directories}: expected STUDENT,TEACHER or STUDENT,TEACHER,aligned')
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'path': student},
            'teacher': {'path': teacher},
            'distill': {'alpha': 0.5, 'alignment': {}} if aligned else {},
            'data': {'paths': ('train.jsonl',)},
            'eval': {'every': 100},
            'batch': {'size': 64, 'length': 2048, 'microbatches': 8},
            'steps': 1000,
            'schedule': {'kind': 'cosine', 'lr': 1e-4, 'min_lr': 1e-5, 'warmup': 50},
            'compute': {'remat': 'full'},
            'checkpoint': {'every': 100},
        },
    )
