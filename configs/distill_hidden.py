"""A student that learns from its teacher's logits and from two of its hidden states, through projections of their own.

Nothing is downloaded: the teacher is the one that jpt ships, the text is Python's standard library. See
docs/distill.md, "Pairs of hidden states".
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QUICKSTART_STUDENT
from jpt.training.settings import TrainConfig


def get_config() -> ConfigDict:
    """Settings of the run."""
    pairs = (
        {'student': 'layers.0.output', 'teacher': 'layers.1.output', 'weight': 0.2, 'projection': True},
        {'student': 'final_norm.output', 'teacher': 'final_norm.output', 'weight': 0.2, 'projection': True},
    )
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'architecture': QUICKSTART_STUDENT},
            'teacher': {'path': 'quickstart'},
            'distill': {'alpha': 1.0, 'temperature': 1.0, 'pairs': pairs},
            'data': {'paths': ('stdlib:train',), 'packing': 'concat', 'window_rows': 16384},
            'eval': {'data': {'paths': ('stdlib:held_out',), 'packing': 'concat'}, 'batches': 32},
            'batch': {'size': 8, 'length': 256},
            'steps': 300,
            'compute': {'unroll': 2},
            'optimizer': {'name': 'muon'},
            'schedule': {'kind': 'linear', 'lr': 8e-3, 'warmup': 20},
            'checkpoint': {'every': 50, 'keep': 1},
        },
    )
