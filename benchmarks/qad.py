"""How much of a quantization's loss distillation from the original wins back (QAD), and training on text alone (QAT).

    python benchmarks/qad.py --formats nvfp4 int4_weights --steps=100 --json

The quickstart's teacher is calibrated and quantized, and then trained through its rounding for some steps: by the
forward KL to itself unquantized, or by cross-entropy. Measured is held-out text: loss, and KL(original || this).
`recovered` is the share of what quantizing added that training took away again.
"""

import argparse
import dataclasses
import json
from itertools import product
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from students import LENGTH, add_options, held_out_of, machine, on_cpu, quickstart

from jpt.data.batch import Batch
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from
from jpt.model import Model
from jpt.quant.recipes import recipe_of
from jpt.quantization.run import ModelReport, measured, quantize_model
from jpt.training.run import run_job
from jpt.training.settings import EvalConfig, FakeQuantConfig, ModelSource, TrainConfig

KINDS = ('QAD', 'QAT')


def settings_of(kind: str, calibrated: Path, seed: int, options: argparse.Namespace) -> TrainConfig:
    """The job: the quickstart's data and batch, AdamW at a small rate, the model as its own teacher or none; the seed
    draws the order of its text.
    """
    base = quickstart()
    return dataclasses.replace(
        base,
        seed=seed,
        task='distill' if kind == 'QAD' else 'pretrain',
        model=ModelSource(options.teacher),
        teacher=ModelSource(options.teacher) if kind == 'QAD' else None,
        tokenizer=None,
        data=dataclasses.replace(base.data, paths=(options.train,)),
        quantize=FakeQuantConfig(calibrated=str(calibrated)),
        steps=options.steps,
        compare=None,
        eval=EvalConfig(),
        optimizer=dataclasses.replace(base.optimizer, name='adamw', weight_decay=0.0),
        schedule=dataclasses.replace(base.schedule, kind='cosine', lr=options.rate, warmup=5),
        checkpoint=dataclasses.replace(base.checkpoint, every=options.steps, export=False),
    )


def rows_of(form: str, original: Model, held_out: list[Batch], options: argparse.Namespace) -> list[ModelReport]:
    """The model quantized as it is, and after training."""
    text = TextConfig.of_files(options.train, options.held_out, rows=options.rows, length=LENGTH)
    calibration, _ = batches_from(original, text)
    calibrated = options.workdir / f'calibrated_{form}'
    made = quantize_model(original, recipe_of(form), calibration, held_out)
    if not calibrated.exists():
        made.model.save(calibrated)
    rows = [measured(form, made.model, original, held_out)]
    for kind, seed in product(options.kinds, range(options.seeds)):
        job = settings_of(kind, calibrated, seed, options)
        trained = run_job(job, options.workdir / f'{kind}_{form}_{options.steps}_{options.rate}_{seed}')
        rows.append(measured(f'{form}, {kind}, seed {seed}', trained, original, held_out))
    return rows


def main() -> None:
    """Trains and prints the table, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='What training through the rounding wins back.')
    add_options(parser)
    parser.set_defaults(seeds=1)
    parser.add_argument('--formats', nargs='+', default=['nvfp4', 'int4_weights'])
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=list(KINDS))
    parser.add_argument('--rate', type=float, default=2e-4, help='peak learning rate')
    parser.add_argument('--measured', type=int, default=512, help='windows to take losses of; fewer say little')
    parser.add_argument('--workdir', type=Path, default=Path('out/qad'))
    options = parser.parse_args()
    on_cpu(options.workdir)
    original, held_out = held_out_of(argparse.Namespace(**{**vars(options), 'rows': options.measured}))
    base = measured('original', original, original, held_out)
    found: dict[str, Any] = {'original': base._asdict()}
    table = Table('model', 'loss', 'KL to the original', 'same top word, %', 'loss recovered', box=box.MARKDOWN)
    table.add_row('original', f'{base.loss:.4f}', '0', '100', '')
    for form in options.formats:
        rows = rows_of(form, original, held_out, options)
        added = rows[0].loss - base.loss
        for row in rows:
            share = (rows[0].loss - row.loss) / added
            found[row.name] = row._asdict() | {'recovered': share}
            shown = '' if row is rows[0] else f'{100 * share:.0f} % (of KL {100 * (1 - row.kl / rows[0].kl):.0f} %)'
            table.add_row(row.name, f'{row.loss:.4f}', f'{row.kl:.5f}', f'{100 * row.agreement:.2f}', shown)
    console = Console(width=120)
    console.print(f'{machine()}; {options.steps} steps, rate {options.rate}')
    console.print(table)
    if options.json:
        print(json.dumps({'benchmark': 'qad', 'machine': machine(), 'rows': found}))


if __name__ == '__main__':
    main()
