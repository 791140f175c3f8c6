"""Distillation in two parts: what the teacher says of the data is recorded once, then students learn from that.

    python -m jpt.distill.record --config=configs/distill_recorded.py --output=out/recorded
    python -m jpt.train --config=configs/distill_recorded.py --config.distill.targets=out/recorded

Without --config.distill.targets the second command distils online, from the same teacher on the same rows. The teacher
is the one that jpt ships; another: --config.teacher.path=DIR --config.model.architecture=... or, for a student from a
checkpoint, configs/distill_recorded.py:path/to/student. See docs/record.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QUICKSTART_STUDENT
from jpt.training.settings import TrainConfig

# Pieces of documents as the recorder cuts them: none is cut further to fill rows. Most are as long as a row anyway.
DATA = {'packing': 'best_fit', 'least_fill': 0.0}


def get_config(student: str = '') -> ConfigDict:
    """Settings of both parts, the student from a checkpoint's directory or from random weights."""
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'path': student} if student else {'architecture': QUICKSTART_STUDENT},
            'teacher': {'path': 'quickstart'},
            'record': {'likely': 64, 'dtype': 'float16'},
            'data': DATA | {'paths': ('stdlib:train',)},
            'eval': {'data': DATA | {'paths': ('stdlib:held_out',)}},
            'batch': {'size': 8, 'length': 256},
            'steps': 300,
            'compute': {'unroll': 2},
            'optimizer': {'name': 'muon'},
            'schedule': {'kind': 'linear', 'lr': 8e-3, 'warmup': 20},
            'checkpoint': {'every': 50, 'keep': 1},
        },
    )
