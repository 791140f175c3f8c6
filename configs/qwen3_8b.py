"""Supervised tuning of a model of Qwen3-8B's shape on eight H100: the job that the plan page compiles ahead of time.

Name the checkpoint after the config, and your conversations: --config=configs/qwen3_8b.py:DIR
--config.data.paths="('train.jsonl',)". Without a checkpoint the weights are random, which is enough for jpt.plan. Other
meshes: --config.mesh.fsdp=8 --config.mesh.tensor=1, or --config.mesh.pipe=2 --config.mesh.tensor=4
--config.batch.microbatches=8.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.training.settings import TrainConfig

ARCHITECTURE = {
    'model_type': 'qwen3',
    'vocab_size': 151936,
    'hidden_size': 4096,
    'intermediate_size': 12288,
    'num_hidden_layers': 36,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 40960,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'tie_word_embeddings': False,
}


def get_config(checkpoint: str = '') -> ConfigDict:
    """Settings of the run, from a checkpoint's directory or from random weights."""
    return config_dict(
        TrainConfig,
        {
            'task': 'sft',
            'model': {'path': checkpoint} if checkpoint else {'architecture': ARCHITECTURE},
            'data': {'paths': ('train.jsonl',), 'kind': 'chat', 'long_documents': 'truncate'},
            'batch': {'size': 8, 'length': 4096},
            'steps': 1000,
            'optimizer': {'moments': 'bfloat16'},
            'schedule': {'kind': 'cosine', 'lr': 1e-5, 'min_lr': 1e-6, 'warmup': 30},
            'compute': {'dtype': 'bfloat16', 'remat': 'full', 'xla_flags': 'overlap'},
            'mesh': {'data': 1, 'tensor': 8},
        },
    )
