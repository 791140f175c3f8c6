"""Distillation in two parts: what the teacher says of the data is recorded once, then students learn from that.

    python -m jpt.distill.record --config=configs/distill_recorded.py --output=out/recorded
    python -m jpt.train --config=configs/distill_recorded.py --config.distill.targets=out/recorded

Without --config.distill.targets the second command distils online, from the same teacher on the same rows. The teacher
is the one that jpt ships; another: --config.teacher.path=DIR --config.model.architecture=... or, for a student from a
checkpoint, configs/distill_recorded.py:path/to/student. See docs/record.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.training.settings import TrainConfig

STUDENT = {
    'model_type': 'llama',
    'vocab_size': 4096,
    'hidden_size': 160,
    'intermediate_size': 432,
    'num_hidden_layers': 2,
    'num_attention_heads': 5,
    'num_key_value_heads': 5,
    'head_dim': 32,
    'max_position_embeddings': 256,
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'tie_word_embeddings': True,
    'bos_token_id': 0,
    'eos_token_id': 0,
    'pad_token_id': 1,
}
# Pieces of documents as the recorder cuts them: none is cut further to fill rows. Most are as long as a row anyway.
DATA = {'packing': 'best_fit', 'least_fill': 0.0}


def get_config(student: str = '') -> ConfigDict:
    """Settings of both parts, the student from a checkpoint's directory or from random weights."""
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'path': student} if student else {'architecture': STUDENT},
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
