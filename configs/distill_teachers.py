"""One student from several teachers: a quarter of every divergence from the first, the rest from the second.

Name the student, then the teachers: --config=configs/distill_teachers.py:STUDENT,TEACHER,TEACHER
--config.data.paths="('train.jsonl',)". All must have one tokenizer; their tables may be padded to several sizes.
Where every record says who teaches it ({"text": ..., "subject": "first"}), name the field, and weigh all alike:
--config.data.route_key=subject --config.teachers.second.weight=1.0
Weights move from forward to reverse KL over the first half of the run, and cross-entropy has a tenth throughout.
Without directories the file describes the job by its numbers, for jpt.plan.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QWEN3_1B7, QWEN3_8B
from jpt.training.settings import TrainConfig

STEPS = 1000


def get_config(directories: str = '') -> ConfigDict:
    """Settings of the run, from directories 'STUDENT,TEACHER,TEACHER' or from shapes."""
    given = directories.split(',') if directories else []
    if len(given) not in (0, 3):
        raise ValueError(f"expected STUDENT,TEACHER,TEACHER, found '{directories}'")
    sources: list[dict[str, object]] = [{'path': path} for path in given]
    sources = sources or [{'architecture': shape} for shape in (QWEN3_1B7, QWEN3_8B, QWEN3_8B)]
    student, first, second = sources
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': student,
            'teachers': {'first': first | {'weight': 1.0}, 'second': second | {'weight': 3.0}},
            'distill': {
                'forward_kl': 1.0,
                'alpha': 0.9,
                'schedule': {'to': {'forward_kl': 0.2, 'reverse_kl': 0.8}, 'end': STEPS // 2, 'kind': 'cosine'},
            },
            'data': {'paths': ('train.jsonl',)},  # with route_key a record has one of the teachers, else both
            'batch': {'size': 64, 'length': 4096, 'microbatches': 8},
            'steps': STEPS,
            'optimizer': {'moments': 'bfloat16'},
            'schedule': {'kind': 'cosine', 'lr': 5e-5, 'min_lr': 5e-6, 'warmup': 50},
            'compute': {'dtype': 'bfloat16', 'remat': 'full', 'xla_flags': 'fsdp'},
            'mesh': {'data': 1, 'fsdp': 8},
            'checkpoint': {'every': 100},
        },
    )
