"""A teacher, a data set and jobs that learn from what it said, all tiny.

As a config file: `--config=tests/distill/recorded.py:FOLDER`, once teacher and texts are written to FOLDER.
"""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from jpt.config import config_dict, from_config_dict
from jpt.data.pipeline import make_pipeline
from jpt.model import Model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.training.settings import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / 'jpt' / 'assets' / 'quickstart_teacher'
STUDENT = {
    'model_type': 'llama',
    'vocab_size': 4096,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'max_position_embeddings': 64,
    'tie_word_embeddings': True,
}
TEACHER = STUDENT | {'hidden_size': 24, 'num_hidden_layers': 3, 'tie_word_embeddings': False}
# From one token to several rows of 24.
TEXTS = [f'def f_{i}(x):\n    return {i} + x\n' * (1 + i % 5) for i in range(14)] + ['x']
LENGTH = 24


def export_teacher(folder: pathlib.Path, scale: float = 8.0) -> pathlib.Path:
    """A Hugging Face directory of a random teacher; its head is scaled, so that it is far from uniform."""
    cfg = config_from_hf(TEACHER)
    params = jax.jit(init, static_argnums=0)(cfg, jax.random.key(0))
    params['lm_head']['kernel'] = scale * params['lm_head']['kernel']
    Model(cfg, params, None, TOKENIZER).export(folder)
    return folder


def write_texts(path: pathlib.Path, texts=TEXTS) -> str:
    path.write_text('<|cut|>'.join(texts))
    return str(path)


def get_config(folder: str, **changes) -> ConfigDict:
    """A distillation of folder/teacher into a random student on folder/text.txt; record it, or train."""
    folder = pathlib.Path(folder)
    data = {'paths': (str(folder / 'text.txt'),), 'separator': '<|cut|>', 'least_fill': 0.0, 'prefetch': 0}
    values = {
        'task': 'distill',
        'model': {'architecture': STUDENT},
        'teacher': {'path': str(folder / 'teacher')},
        'tokenizer': str(TOKENIZER),
        'distill': {'temperature': 1.5},
        'record': {'likely': 8},
        'data': data,
        'batch': {'size': 8, 'length': LENGTH},
        'steps': 2,
        'schedule': {'lr': 1e-2, 'warmup': 1},
        'checkpoint': {'every': 2, 'export': False},
        'log': {'every': 1},
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) and value else value
    return config_dict(TrainConfig, values)


def settings(folder: pathlib.Path, **changes) -> TrainConfig:
    """The same as the dataclass that programs take."""
    return from_config_dict(TrainConfig, get_config(str(folder), **changes), 'config')


def learning(folder: pathlib.Path, targets: pathlib.Path, **changes) -> TrainConfig:
    """The same distillation from recorded targets."""
    distill = {'targets': str(targets), **changes.pop('distill', {})}
    return settings(folder, **{'teacher': None, 'distill': distill, **changes})


def batches(config: TrainConfig, tokenizer, targets=None, **options):
    """One pass over the data of a job, in memory."""
    pipeline = make_pipeline(
        config.data,
        tokenizer,
        batch_size=config.batch.size,
        seq_len=config.batch.length,
        num_epochs=1,
        targets=targets,
        **options,
    )
    found = list(pipeline)
    pipeline.close()
    return found


def said_of_tokens(batch) -> dict[bytes, np.ndarray]:
    """Of every segment its ids as a key, and what the teacher said of its positions: independent of rows."""
    found = {}
    for b, segments in enumerate(batch.segment_ids):
        for number in range(1, segments.max(initial=0) + 1):
            own = segments == number
            key = np.append(batch.tokens[b, own], batch.targets[b, own][-1]).tobytes()
            found[key] = [np.asarray(leaf[b, own], np.float64) for leaf in batch.sparse_target]
    return found
