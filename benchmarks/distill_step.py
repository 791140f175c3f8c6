"""A step of distillation beside what it is made of: the student's own step, and the teacher's forward pass.

    python benchmarks/distill_step.py [--rows=8 --length=256 --repeats=10] [--json]

Both models have the shapes of the quickstart and random weights; the logits' gradients come from all words. The
teacher's pass gives the cross-entropy, its head included, chunk by chunk. The overhead is what the step takes above the
sum of the two; the goal is 5 %. Times are the best of --repeats calls in turn, in milliseconds, on the clock and of all
threads together.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
from jobs import random_job, step_of
from timing import Timing, in_turn, machine

import jpt
from jpt.models.families import config_from_hf
from jpt.models.shapes import QUICKSTART_STUDENT, QUICKSTART_TEACHER
from jpt.models.transformer import init
from jpt.training.job import first_state


def measure(rows: int, length: int, repeats: int, dtype: str) -> dict[str, Timing]:
    """Times by name."""
    compute = {'compute': {'dtype': dtype, 'unroll': 4}}
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_from_hf(QUICKSTART_TEACHER)
        path = Path(folder) / 'teacher'
        jpt.Model(cfg, jax.jit(init, static_argnums=0)(cfg, jax.random.key(0))).export(path)
        teacher = {'model': {'path': str(path)}}
        distilled = {'task': 'distill', 'teacher': {'path': str(path)}}
        alone, batch = random_job(QUICKSTART_STUDENT, rows, length, **compute)
        together, _ = random_job(QUICKSTART_STUDENT, rows, length, **compute, **distilled)
        theirs, _ = random_job(QUICKSTART_TEACHER, rows, length, **compute, **teacher)
        state = first_state(theirs)
        runs = {
            'student': step_of(alone, batch),
            'teacher forward': lambda: theirs.eval_step(state, batch),
            'distillation': step_of(together, batch),
        }
        return in_turn(runs, repeats)


def main() -> None:
    """Prints the times and the overhead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {'rows': 8, 'length': 256, 'repeats': 10}.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    times = measure(args.rows, args.length, args.repeats, args.dtype)
    print(f'{"":20s}{"wall ms":>10s}{"cpu ms":>10s}')
    for name, time in times.items():
        print(f'{name:20s}{time.wall_ms:10.1f}{time.cpu_ms:10.1f}')
    parts = [times[name] for name in ('student', 'teacher forward')]
    whole = times['distillation']
    over = Timing(*(mine / sum(of) - 1 for mine, of in zip(whole, zip(*parts, strict=True), strict=True)))
    print(f'{"overhead":20s}{over.wall_ms:10.1%}{over.cpu_ms:10.1%}')
    if args.json:
        results = {name: time._asdict() for name, time in times.items()}
        print(json.dumps({'benchmark': 'distill_step', **machine(), **vars(args), 'results': results}))


if __name__ == '__main__':
    main()
