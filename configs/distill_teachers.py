"""One student from several teachers: a quarter of every divergence from the first, the rest from the second.

Name the student, then the teachers: --config=configs/distill_teachers.py:STUDENT,TEACHER,TEACHER
--config.data.paths="('train.jsonl',)". All must have one tokenizer; their tables may be padded to several sizes.
Weights move from forward to reverse KL over the first half of the run, and cross-entropy has a tenth throughout.
Without directories the file describes the job by its numbers, for jpt.plan.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.training.settings import TrainConfig

SHAPE = {
    'model_type': 'qwen3',
    'vocab_size': 151936,
    'hidden_size': 2048,
    'intermediate_size': 6144,
    'num_hidden_layers': 28,
    'num_attention_heads': 16,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 40960,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'tie_word_embeddings': True,
}
LARGE = SHAPE | {
    'hidden_size': 4096,
    'intermediate_size': 12288,
    'num_hidden_layers': 36,
    'num_attention_heads': 32,
    'tie_word_embeddings': False,
}
STEPS = 1000


def get_config(directories: str = '') -> ConfigDict:
    """Settings of the run, from directories 'STUDENT,TEACHER,TEACHER' or from shapes."""
    given = directories.split(',') if directories else []
    if len(given) not in (0, 3):
        raise ValueError(f"expected STUDENT,TEACHER,TEACHER, found '{directories}'")
    sources: list[dict[str, object]] = [{'path': path} for path in given]
    sources = sources or [{'architecture': shape} for shape in (SHAPE, LARGE, LARGE)]
    student, first, second = sources
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': student,
            'teachers': {'first': first | {'weight': 1.0}, 'second': second | {'weight': 3.0}},
            'distill': {
                'forward_kl': 1.0,
                'alpha': 0.9,
                'schedule': {'to': {'forward_kl': 0.2, 'reverse_kl': 0.8}, 'end': STEPS // 2, 'kind': 'cosine'},
            },
            'data': {'paths': ('train.jsonl',)},
            'batch': {'size': 64, 'length': 4096, 'microbatches': 8},
            'steps': STEPS,
            'optimizer': {'moments': 'bfloat16'},
            'schedule': {'kind': 'cosine', 'lr': 5e-5, 'min_lr': 5e-6, 'warmup': 50},
            'compute': {'dtype': 'bfloat16', 'remat': 'full', 'xla_flags': 'fsdp'},
            'mesh': {'data': 1, 'fsdp': 8},
            'checkpoint': {'every': 100},
        },
    )
