"""A training job that takes seconds: a two-layer model on a few sentences.

As a config file: `python -m jpt.train --config=tests/training/tiny.py:FOLDER`, the text being written to FOLDER.
"""

import pathlib

from ml_collections import ConfigDict

from jpt.config import config_dict, from_config_dict
from jpt.training.settings import TrainConfig

TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / 'jpt' / 'assets' / 'quickstart_teacher'
ARCHITECTURE = {
    'model_type': 'llama',
    'vocab_size': 4096,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'head_dim': 8,
    'max_position_embeddings': 64,
    'tie_word_embeddings': True,
}
TEXT = [f'def add_{i}(a, b):\n    """Return {i} + a + b."""\n    return {i} + a + b\n' for i in range(40)]


def get_config(folder: str, **changes: object) -> ConfigDict:
    """Settings of the tiny job, its text written to `folder`, with top-level fields replaced."""
    path = pathlib.Path(folder) / 'text.txt'
    path.write_text('<|cut|>'.join(TEXT))
    data = {'paths': (str(path),), 'separator': '<|cut|>', 'prefetch': 0}
    values = {
        'task': 'pretrain',
        'model': {'architecture': ARCHITECTURE},
        'tokenizer': str(TOKENIZER),
        'data': data,
        'eval': {'data': data, 'batches': 2},
        'batch': {'size': 8, 'length': 32},
        'steps': 7,
        'schedule': {'lr': 1e-2, 'warmup': 1},
        'checkpoint': {'every': 3, 'export': False},
        'log': {'every': 1},
    }
    return config_dict(TrainConfig, values | changes)


def settings(folder: pathlib.Path, **changes: object) -> TrainConfig:
    """The same as the dataclass that programs take."""
    return from_config_dict(TrainConfig, get_config(str(folder), **changes), 'config')
