"""The teacher that the quickstart ships: a small Llama trained on the training files of Python's standard library.

5.9 million parameters, 900 steps of 2,048 tokens: 1.84 million tokens, 0.9 of a pass over the files of Python 3.11.7.
It took an hour on two CPU cores shared with other work; alone the run takes about half an hour. At the end: training
loss 3.37, held-out loss 4.06 nats per token. The weights in jpt/assets/quickstart_teacher are its result, rounded to
bfloat16 by `python -m jpt.convert --to=hf --dtype=bfloat16`.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QUICKSTART_TEACHER
from jpt.training.settings import TrainConfig


def get_config() -> ConfigDict:
    """Settings of the run."""
    return config_dict(
        TrainConfig,
        {
            'task': 'pretrain',
            'model': {'architecture': QUICKSTART_TEACHER},
            'tokenizer': 'jpt/assets/quickstart_teacher',
            # One window is a whole pass over the text, so that its rows are shuffled together.
            'data': {'paths': ('stdlib:train',), 'packing': 'concat', 'window_rows': 16384},
            'eval': {'data': {'paths': ('stdlib:held_out',), 'packing': 'concat'}, 'every': 300},
            'batch': {'size': 8, 'length': 256},
            'steps': 900,
            'compute': {'unroll': 4},  # on CPU a scan over layers first fills what it stacks with zeros
            'optimizer': {'name': 'muon'},
            'schedule': {'kind': 'wsd', 'lr': 5e-3, 'warmup': 50, 'decay_steps': 350},
            'checkpoint': {'every': 100},
        },
    )
