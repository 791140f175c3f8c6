"""What a student that was cut out of its teacher is worth, after the same distillation, beside one from scratch.

    python benchmarks/pruned_student.py --seeds=3 --json

The teacher is the shipped one, or another by --teacher, --train and --held_out. A student has a layer less, half of its
MLP channels, a query head for each kv head, and three quarters of its hidden dimensions. Three students of this
architecture learn from it by the settings of configs/quickstart.py, on the same tokens: one pruned by importance
(`jpt.prune`), one that keeps parts drawn at random, which importance must beat, and one from random weights. Each gets
the learning rate of --rates that is best for it on seed 0. The held-out loss is taken before and after. Seeds are those
of the calibration windows, the random parts, the weights and the order of the data. A run that is there already is not
made again. Below it stands what each size costs alone, without distillation.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from students import add_options, held_out_of, importance_of, machine, on_cpu, pruned, target_of, trained

import jpt
from jpt.checkpoint.source import TreeSource
from jpt.evaluation.text import mean_loss
from jpt.model import Model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.prune import in_memory
from jpt.pruning.importance import Importance
from jpt.pruning.target import Target, steps
from jpt.training.settings import ModelSource

STUDENTS = ('importance', 'random parts', 'from scratch')


def by_chance(scores: Importance, seed: int) -> Importance:
    """Scores that say nothing; what norms are scaled by is measured as ever."""
    rng = np.random.default_rng(seed)
    parts = {name: getattr(scores, name) for name in ('layers_L', 'mlp_LF', 'heads_LN', 'width_LD')}
    return dataclasses.replace(scores, **{name: rng.random(np.shape(part)) for name, part in parts.items()})


def prepare(seed: int, options: argparse.Namespace, workdir: Path) -> dict[str, dict[str, Any]]:
    """Writes both pruned students of a seed; {student: where its model comes from}."""
    model = jpt.load(options.teacher, dtype='float32')
    scores = importance_of(model, options, seed)
    found: dict[str, dict[str, Any]] = {}
    for name, chosen in (('importance', scores), ('random parts', by_chance(scores, seed))):
        path = pruned(model, chosen, workdir / name.replace(' ', '_'))
        found[name] = {'path': str(path)}
    architecture = json.loads((path / 'config.json').read_text())
    found['from scratch'] = {'architecture': {k: v for k, v in architecture.items() if k != 'dtype'}}
    return found


def one_run(name: str, seed: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out losses of a student before and after, from the file where they were written before."""
    workdir = options.workdir / f'seed_{seed}'
    run = workdir / f'{name.replace(" ", "_")}_{rate}_{options.steps}'
    done = workdir / f'{run.name}.json'
    if done.exists():
        return json.loads(done.read_text())
    held_out = held_out_of(options)[1]
    source = prepare(seed, options, workdir)[name]
    if 'path' in source:
        before = jpt.load(source['path'], dtype='float32')
    else:
        cfg = config_from_hf(source['architecture'])
        before = Model(cfg, init(cfg, jax.random.key(seed)))
    start = time.monotonic()
    student = trained(ModelSource(**source), seed, rate, options, run)
    row = {
        'before': mean_loss(before, held_out),
        'after': mean_loss(student, held_out),
        'seconds': time.monotonic() - start,
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(student.params)),
        'rate': rate,
    }
    done.write_text(json.dumps(row))
    return row


def one_part_alone(options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each size of the target alone the loss by importance, and by three random choices, before distillation."""
    teacher, held_out = held_out_of(options)
    scores = importance_of(teacher, options, 0)
    whole = TreeSource(teacher.config, teacher.params)

    def loss(chosen: Importance, target: Target) -> float:
        return mean_loss(in_memory(list(steps(whole, chosen, target))[-1].source), held_out)

    rows = []
    for name, size in vars(target_of(teacher.config)).items():
        if size is not None:
            target = Target(**{name: size})
            chance = [loss(by_chance(scores, seed), target) for seed in range(3)]
            rows.append({'size': f'{name}={size}', 'importance': loss(scores, target), 'random': chance})
    return rows


def show(runs: dict[str, list[dict[str, Any]]], parts: list[dict[str, Any]], teacher: float, console: Console) -> None:
    """One row per student: means over seeds, and the losses of each; one row per size that is cut alone."""
    table = Table('student', 'rate', 'loss before', 'loss after', 'after, by seed')
    for name, found in runs.items():
        before, after = ([run[when] for run in found] for when in ('before', 'after'))
        seeds = ', '.join(f'{loss:.3f}' for loss in after)
        table.add_row(name, f'{found[0]["rate"]}', f'{np.mean(before):.3f}', f'{np.mean(after):.3f}', seeds)
    table.add_row('the teacher', '', f'{teacher:.3f}', '', '')
    console.print(table)
    table = Table('one size alone, no distillation', 'loss, importance', 'loss, random parts')
    for row in parts:
        table.add_row(row['size'], f'{row["importance"]:.3f}', ', '.join(f'{loss:.3f}' for loss in row['random']))
    console.print(table)


def main() -> None:
    """Runs all and prints the table, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='Students cut out of their teacher, and one from scratch.')
    add_options(parser)
    parser.add_argument('--rates', type=float, nargs='+', default=[8e-3, 2e-3])
    parser.add_argument('--workdir', type=Path, default=Path('out/pruned_student'))
    options = parser.parse_args()
    on_cpu(options.workdir)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in STUDENTS}
    for seed in range(options.seeds):
        for name in STUDENTS:
            rates = [runs[name][0]['rate']] if seed else options.rates
            tried = [one_run(name, seed, rate, options) for rate in rates]
            runs[name].append(min(tried, key=lambda run: run['after']))
            print(f'seed {seed}, {name}: {runs[name][-1]}', flush=True)
    teacher = mean_loss(*held_out_of(options))
    target = target_of(jpt.load(options.teacher).config)
    console = Console(width=120)
    console.print(f'{machine()}; {options.steps} steps, {options.teacher} to {target}')
    parts = one_part_alone(options)
    show(runs, parts, teacher, console)
    if options.json:
        found = {'benchmark': 'pruned_student', 'machine': machine(), 'runs': runs, 'parts': parts, 'teacher': teacher}
        print(json.dumps(found))


if __name__ == '__main__':
    main()
