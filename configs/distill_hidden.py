"""A student that learns from its teacher's logits and from two of its hidden states, through projections of their own.

Nothing is downloaded: the teacher is the one that jpt ships, the text is Python's standard library. See
docs/distill.md, "Pairs of hidden states".
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
            'model': {'architecture': STUDENT},
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
