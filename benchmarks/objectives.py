"""What a student learns by each objective of distillation: same start, same tokens, same steps, several seeds.

    python benchmarks/objectives.py --seeds=3 --json

    python benchmarks/objectives.py --fresh --whole_pieces --steps=300 --rates 8e-3 --seeds=3 --objectives ...

The student is cut out of the teacher by importance (benchmarks/students.py), or with --fresh it is that of the
quickstart with random weights, and trained by the settings of configs/quickstart.py; only the objective changes. Each
objective gets the learning rate of --rates after which its held-out loss is lowest on seed 0. A seed is that of the
calibration windows (or the random weights) and of the order of the data, which all objectives share. On held-out text:
the loss, the KL divergence between teacher and student both ways, how often both have the same likeliest word, and the
student's entropy. A run that is there already is not made again, so a part may be run by --objectives and --seeds and
the rest later; another teacher, text, student, batch or packing needs a workdir of its own. What the offline objective
reads is recorded once, in rows of whole pieces: beside it the others are compared with --whole_pieces, so that all
learn from the same rows.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from students import LENGTH, add_options, held_out_of, importance_of, machine, on_cpu, pruned, quickstart, trained

import jpt
from jpt.data.batch import Batch
from jpt.distill.losses import divergence, label_cross_entropy
from jpt.distill.pairs import HiddenPair
from jpt.distill.recording import record
from jpt.distill.settings import DistillConfig
from jpt.kernels.divergences import Divergence
from jpt.model import Model
from jpt.models.shapes import QUICKSTART_STUDENT
from jpt.training.settings import EvalConfig, ModelSource

OBJECTIVES: dict[str, dict[str, Any]] = {
    'forward KL': {'distill': DistillConfig()},
    'reverse KL': {'distill': DistillConfig(forward_kl=0, reverse_kl=1)},
    'JSD, beta 0.5': {'distill': DistillConfig(forward_kl=0, jsd=1, beta=0.5)},
    'skewed KL, 0.1': {'distill': DistillConfig(forward_kl=0, skew_kl=1, skew=0.1)},
    'skewed reverse KL, 0.1': {'distill': DistillConfig(forward_kl=0, skew_reverse_kl=1, skew=0.1)},
    'total variation': {'distill': DistillConfig(forward_kl=0, total_variation=1)},
    'forward KL and cross-entropy, alpha 0.5': {'distill': DistillConfig(alpha=0.5)},
    'forward KL, temperature 2': {'distill': DistillConfig(temperature=2)},
    'forward KL and hidden states': {
        'distill': DistillConfig(
            pairs=(
                HiddenPair('layers.0.output', 'layers.1.output', weight=0.2, projection=True),
                HiddenPair('final_norm.output', 'final_norm.output', weight=0.2, projection=True),
            )
        )
    },
    'forward KL, 64 recorded words': {'teacher': None},
    'cross-entropy, no teacher': {'task': 'pretrain', 'teacher': None},
}
OFFLINE = 'forward KL, 64 recorded words'
MEASURES = ('loss', 'kl', 'reverse_kl', 'agreement', 'entropy')


@jax.jit
def sums_of(logits_BTV: jax.Array, teacher_BTV: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Sums of the measures over the tokens that count."""
    mask = batch.loss_mask
    log_q = jax.nn.log_softmax(logits_BTV, axis=-1)
    same = jnp.argmax(logits_BTV, axis=-1) == jnp.argmax(teacher_BTV, axis=-1)
    return {
        'loss': label_cross_entropy(logits_BTV, batch.targets, mask)[0],
        'kl': divergence(logits_BTV, teacher_BTV, mask)[0],
        'reverse_kl': divergence(logits_BTV, teacher_BTV, mask, Divergence('reverse_kl'))[0],
        'agreement': jnp.sum(mask * same),
        'entropy': -jnp.sum(mask * jnp.sum(jnp.exp(log_q) * log_q, axis=-1)),
    }


def measured(student: Model, teacher: Model, batches: Sequence[Batch]) -> dict[str, float]:
    """Means of the measures over all tokens of the batches."""
    totals, count = dict.fromkeys(MEASURES, 0.0), 0.0
    for batch in batches:
        where = (batch.tokens, batch.positions, batch.segment_ids)
        sums = sums_of(student.logits(*where), teacher.logits(*where), batch)
        totals = {name: total + float(sums[name]) for name, total in totals.items()}
        count += float(batch.loss_mask.sum())
    return {name: total / count for name, total in totals.items()}


def one_run(name: str, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """The measures of a trained student, from the file where they were written before."""
    workdir = options.workdir / f'seed_{seed}'
    run = workdir / f'{name.replace(",", "").replace(" ", "_")}_{rate}_{options.steps}'
    done = run.with_name(f'{run.name}.json')
    if done.exists():
        return json.loads(done.read_text())
    teacher, held_out = held_out_of(options)
    start = time.monotonic()
    student = trained(student_of(seed, options), seed, rate, options, run, **changes_of(name, options))
    row = measured(student, teacher, held_out) | {'rate': rate, 'seconds': time.monotonic() - start}
    fresh = done.with_suffix('.new')
    fresh.write_text(json.dumps(row))
    fresh.replace(done)
    return row


def changes_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The settings that make an objective; what the offline one reads is recorded if it is not there."""
    base = quickstart()
    changes = dict(OBJECTIVES[name], batch=dataclasses.replace(base.batch, size=options.batch))
    if options.whole_pieces:
        changes['data'] = dataclasses.replace(base.data, paths=(options.train,), packing='best_fit', least_fill=0.0)
    if name == OFFLINE:
        given = {'teacher': ModelSource(options.teacher), 'data': changes['data'], 'eval': EvalConfig()}
        record(dataclasses.replace(base, compare=None, **given), options.workdir / 'recorded')
        changes['distill'] = DistillConfig(targets=str(options.workdir / 'recorded'))
    return changes


def student_of(seed: int, options: argparse.Namespace) -> ModelSource:
    """Where all students of a seed begin."""
    if options.student:
        return ModelSource(options.student.format(seed=seed))
    if options.fresh:
        return ModelSource(architecture=QUICKSTART_STUDENT)
    path = options.workdir / f'seed_{seed}' / 'student'
    if not path.exists():
        teacher = jpt.load(options.teacher, dtype='float32')
        pruned(teacher, importance_of(teacher, options, seed), path)
    return ModelSource(str(path))


def all_runs(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """{objective: a run per seed} at the rate that was best, and {objective: a run per rate} of seed 0."""
    tried: dict[str, list[dict[str, Any]]] = {}
    for name in options.objectives:
        tried[name] = []
        for rate in options.rates:
            tried[name].append(one_run(name, 0, rate, options))
            print(f'seed 0, {name}: {tried[name][-1]}', flush=True)
    runs = {name: [min(found, key=lambda run: run['loss'])] for name, found in tried.items()}
    for seed in range(1, options.seeds):
        for name, found in runs.items():
            found.append(one_run(name, seed, found[0]['rate'], options))
            print(f'seed {seed}, {name}: {found[-1]}', flush=True)
    return runs, tried


def by_seed(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the value of each seed."""
    return f'{np.mean(values):.{digits}f} ({", ".join(f"{value:.{digits}f}" for value in values)})'


def show(
    runs: dict[str, list[dict[str, Any]]],
    tried: dict[str, list[dict[str, Any]]],
    models: dict[str, dict[str, float]],
    console: Console,
) -> None:
    """A row per objective with the mean and every seed, then the loss at each rate that was tried."""
    table = Table('objective', 'rate', 'loss', 'KL(t, s)', 'KL(s, t)', 'same top word, %', 'entropy', box=box.MARKDOWN)
    for name, found in runs.items():
        cells = [by_seed([run[measure] for run in found]) for measure in ('loss', 'kl', 'reverse_kl')]
        cells.append(by_seed([100 * run['agreement'] for run in found], 1))
        table.add_row(name, f'{found[0]["rate"]}', *cells, f'{np.mean([run["entropy"] for run in found]):.3f}')
    for name, row in models.items():
        cells = [f'{row[measure]:.3f}' for measure in ('loss', 'kl', 'reverse_kl')]
        table.add_row(name, '', *cells, f'{100 * row["agreement"]:.1f}', f'{row["entropy"]:.3f}')
    console.print(table)
    table = Table(
        'loss and KL(t, s) on seed 0', *(f'rate {run["rate"]}' for run in next(iter(tried.values()))), box=box.MARKDOWN
    )
    for name, found in tried.items():
        table.add_row(name, *(f'{run["loss"]:.3f}, {run["kl"]:.3f}' for run in found))
    console.print(table)


def main() -> None:
    """Runs all and prints the tables, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='One student by each objective of distillation.')
    add_options(parser)
    parser.add_argument(
        '--objectives', nargs='+', choices=list(OBJECTIVES), default=[name for name in OBJECTIVES if name != OFFLINE]
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument('--student', help='the model that all begin with instead; {seed} in it stands for the seed')
    start.add_argument('--fresh', action='store_true', help='all begin with random weights, as in the quickstart')
    parser.add_argument('--batch', type=int, default=8, help='rows of 256 tokens in a step')
    parser.add_argument('--whole_pieces', action='store_true', help='rows are packed as they are recorded')
    parser.add_argument('--rates', type=float, nargs='+', default=[8e-3, 1.6e-2])
    parser.add_argument('--workdir', type=Path, default=Path('out/objectives'))
    options = parser.parse_args()
    if OFFLINE in options.objectives and not options.whole_pieces:
        parser.error(f'{OFFLINE!r} needs --whole_pieces')
    on_cpu(options.workdir)
    runs, tried = all_runs(options)
    teacher, held_out = held_out_of(options)
    models = {'the teacher': measured(teacher, teacher, held_out)}
    path = student_of(0, options).path
    if path is not None:
        models = {'before training, seed 0': measured(jpt.load(path, dtype='float32'), teacher, held_out), **models}
    console = Console(width=240)
    console.print(f'{machine()}; {options.steps} steps of {options.batch} x {LENGTH} tokens, teacher {options.teacher}')
    show(runs, tried, models, console)
    if options.json:
        print(json.dumps({'benchmark': 'objectives', 'machine': machine(), 'runs': runs, 'rates': tried, **models}))


if __name__ == '__main__':
    main()
