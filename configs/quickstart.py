"""The first job: distil a small teacher into a student a fifth of its size, and see what the teacher was worth.

Nothing is downloaded: the text is Python's standard library, the teacher travels with the package. The student learns
from the teacher's full logits; then the same student starts again and learns from the text alone, on the same tokens.
See docs/quickstart.md.
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


def get_config(student: str = '') -> ConfigDict:
    """Settings of the run; `student` is the directory of one that goes on, such as a pruned teacher (docs/prune.md)."""
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'path': student} if student else {'architecture': STUDENT},
            'teacher': {'path': 'quickstart'},
            'distill': {'alpha': 1.0, 'temperature': 1.0},
            # One window is a whole pass over the text, so that its rows are shuffled together.
            'data': {'paths': ('stdlib:train',), 'packing': 'concat', 'window_rows': 16384},
            'eval': {'data': {'paths': ('stdlib:held_out',), 'packing': 'concat'}},
            'batch': {'size': 8, 'length': 256},
            'steps': 300,
            # Few layers, written out: on CPU a scan over them first fills what it stacks with zeros.
            'compute': {'unroll': 2},
            'optimizer': {'name': 'muon'},
            'schedule': {'kind': 'linear', 'lr': 8e-3, 'warmup': 20},
            'checkpoint': {'every': 50, 'keep': 1},
            'compare': {'prompts': ('def read_lines(path):\n    """', 'class Stack:\n    '), 'sample_tokens': 64},
        },
    )
