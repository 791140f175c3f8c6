"""The first job: distil a small teacher into a student a fifth of its size, and see what the teacher was worth.

Nothing is downloaded: the text is Python's standard library, the teacher travels with the package. The student learns
from the teacher's full logits and two of its hidden states; then the same student starts again and learns from the text
alone, on the same tokens. See docs/quickstart.md.
"""

from ml_collections import ConfigDict

from jpt.config import config_dict
from jpt.models.shapes import QUICKSTART_STUDENT
from jpt.training.settings import TrainConfig

# The student's first layer beside the teacher's second, and what both heads read; the teacher is twice as wide. One
# that was pruned from the teacher may be as wide as it and learns from logits alone.
PAIRS = tuple(
    {'student': student, 'teacher': teacher, 'weight': 0.2, 'projection': True}
    for student, teacher in (('layers.0.output', 'layers.1.output'), ('final_norm.output', 'final_norm.output'))
)


def get_config(student: str = '') -> ConfigDict:
    """Settings of the run; `student` is the directory of one that goes on, such as a pruned teacher (docs/prune.md)."""
    return config_dict(
        TrainConfig,
        {
            'task': 'distill',
            'model': {'path': student} if student else {'architecture': QUICKSTART_STUDENT},
            'teacher': {'path': 'quickstart'},
            # Of six objectives the best on three seeds, see benchmarks/results/quickstart_objectives.md.
            'distill': {'alpha': 1.0, 'temperature': 1.0, 'pairs': () if student else PAIRS},
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
