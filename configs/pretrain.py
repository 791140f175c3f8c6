"""Training on plain text or indexed tokens: a new model, or a checkpoint that goes on learning.

    python -m jpt.train --config=configs/pretrain.py
    python -m jpt.train --config=configs/pretrain.py:path/to/model --config.data.paths="('web.bin', 'code.jsonl')" \
        --config.data.weights="(0.7, 0.3)" --config.eval.data.paths=held_out.jsonl

The first command trains a model of 1.3 million parameters on Python's standard library, with the tokenizer that jpt
ships. Data are files or patterns: .jsonl with "text", .txt, .parquet, or Megatron's .bin/.idx (docs/data.md). A new
model is described by the fields of a Hugging Face config.json, --config.model.architecture.hidden_size=512, and wants
--config.tokenizer=DIR and its vocab_size. On GPUs add --config.compute.dtype=bfloat16. See docs/train.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QUICKSTART_STUDENT
from jpt.training.settings import TrainConfig

ARCHITECTURE = QUICKSTART_STUDENT | {'max_position_embeddings': 1024}


def get_config(checkpoint: str = '') -> ConfigDict:
    """Settings of the run, from a checkpoint's directory or from random weights."""
    start = {'path': checkpoint} if checkpoint else {'architecture': ARCHITECTURE}
    return config_dict(
        TrainConfig,
        {
            'task': 'pretrain',
            'model': start,
            'tokenizer': None if checkpoint else 'jpt/assets/quickstart_teacher',
            'data': {'paths': ('stdlib:train',)},
            'eval': {'data': {'paths': ('stdlib:held_out',)}, 'every': 100},
            'batch': {'size': 8, 'length': 256},
            'steps': 500,
            'optimizer': {'name': 'adamw' if checkpoint else 'muon'},
            'schedule': {'kind': 'cosine', 'lr': 1e-4 if checkpoint else 8e-3, 'warmup': 25},
            'checkpoint': {'every': 100},
        },
    )
