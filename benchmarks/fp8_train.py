"""Loss curves of training in FP8 beside those of float32 and of rounding the forward products alone.

    python benchmarks/fp8_train.py --steps=150 --json

The quickstart's student, or with --teacher its teacher, is trained from random weights on text alone, by the teacher's
settings with fewer steps: same weights at the start, same tokens in the same order. Printed are the mean loss of the
last steps, how far the curve (means of so many steps) is from that of float32 at most, and the loss of held-out text.
DeepSeek-V3 (arXiv:2412.19437, section 3.3) says 0.25 % of the loss at 1 T tokens. Curves as short as these depend on
chance: `float32, another seed`, with other weights and tokens at the start, shows by how much.
"""

import argparse
import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from students import ROOT, machine, on_cpu

from jpt.config import from_config_dict
from jpt.models.shapes import QUICKSTART_STUDENT
from jpt.training.run import run_job
from jpt.training.settings import EvalConfig, FakeQuantConfig, ModelSource, TrainConfig

BLOCKS = (('layers/**', 'fp8_block'),)
KINDS: dict[str, FakeQuantConfig | None] = {
    'float32': None,
    'products forward in FP8': FakeQuantConfig(BLOCKS, result='weights'),
    'all products in FP8': FakeQuantConfig(BLOCKS, gradients='block', result='weights'),
    'all, powers of two': FakeQuantConfig((('layers/**', 'fp8_block_ue8m0'),), gradients='block', result='weights'),
    'all, a scale per tensor': FakeQuantConfig((('layers/**', 'fp8_tensor'),), gradients='tensor', result='weights'),
}


def settings_of(quantize: FakeQuantConfig | None, options: argparse.Namespace) -> TrainConfig:
    """The teacher's settings with fewer steps, for one of the two models."""
    given = runpy.run_path(str(ROOT / 'configs' / 'quickstart_teacher.py'))['get_config']()
    base = from_config_dict(TrainConfig, given, 'config')
    assert base.eval.data is not None
    return dataclasses.replace(
        base,
        model=base.model if options.teacher else ModelSource(architecture=dict(QUICKSTART_STUDENT)),
        data=dataclasses.replace(base.data, paths=(options.train,)),
        eval=EvalConfig(dataclasses.replace(base.eval.data, paths=(options.held_out,)), batches=options.batches),
        batch=dataclasses.replace(base.batch, size=options.rows),
        steps=options.steps,
        quantize=quantize,
        schedule=dataclasses.replace(base.schedule, warmup=options.steps // 10, decay_steps=options.steps // 3),
        checkpoint=dataclasses.replace(base.checkpoint, every=options.steps, export=False),
        log=dataclasses.replace(base.log, every=1),
    )


def curve_of(name: str, config: TrainConfig, workdir: Path) -> dict[str, Any]:
    """Runs a job unless it is there, and returns its losses step by step and that of held-out text."""
    run_job(config, workdir)
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses = {row['step']: row['loss'] for row in rows if 'loss' in row}
    held_out = [row['eval_loss'] for row in rows if 'eval_loss' in row]
    return {'name': name, 'losses': [losses[step] for step in sorted(losses)], 'held_out': held_out[-1]}


def compared(run: dict[str, Any], base: dict[str, Any], window: int) -> dict[str, float]:
    """The last losses, and the distance of the curves in per cent; `window`: so many steps make one mean."""
    one, other = (np.asarray(each['losses'], np.float64) for each in (run, base))
    means = [np.convolve(curve, np.ones(window) / window, 'valid') for curve in (one, other)]
    distance = 100 * (means[0] / means[1] - 1)
    return {
        'last': float(means[0][-1]),
        'off': float(distance[-1]),
        'most': float(distance[np.abs(distance).argmax()]),
        'held_out': run['held_out'],
        'held_out_off': 100 * (run['held_out'] / base['held_out'] - 1),
    }


def main() -> None:
    """Trains and prints the table, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='Loss curves of training in FP8.')
    parser.add_argument('--train', default='stdlib:train')
    parser.add_argument('--held_out', default='stdlib:held_out')
    parser.add_argument('--teacher', action='store_true', help='the larger model')
    parser.add_argument('--steps', type=int, default=150)
    parser.add_argument('--rows', type=int, default=8, help='of 256 tokens in a step')
    parser.add_argument('--batches', type=int, default=16, help='of held-out text')
    parser.add_argument('--window', type=int, default=20, help='steps whose losses are averaged')
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=list(KINDS))
    parser.add_argument('--workdir', type=Path, default=Path('out/fp8_train'))
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    on_cpu(options.workdir)
    said = '_'.join(f'{options.steps} {options.rows} {options.batches} {options.teacher} {options.train}'.split())
    said = f'{said}_{options.held_out}'.replace('/', '-')
    runs = []
    for kind in dict.fromkeys(['float32', *options.kinds]):
        config = settings_of(KINDS[kind], options)
        runs.append(curve_of(kind, config, options.workdir / f'{kind.replace(" ", "_")}_{said}'))
    other = dataclasses.replace(settings_of(None, options), seed=1)
    runs.append(curve_of('float32, another seed', other, options.workdir / f'seed_1_{said}'))
    table = Table(
        'products', f'loss, last {options.window} steps', 'off by, %', 'at most, %', 'held-out loss', 'off by, %',
        box=box.MARKDOWN,
    )  # fmt: skip
    found = {}
    for run in runs:
        row = found[run['name']] = compared(run, runs[0], options.window)
        shown = (f'{row["last"]:.4f}', f'{row["off"]:+.2f}', f'{row["most"]:+.2f}')
        table.add_row(run['name'], *shown, f'{row["held_out"]:.4f}', f'{row["held_out_off"]:+.2f}')
    console = Console(width=120)
    console.print(f'{machine()}; {options.steps} steps of {options.rows} x 256 tokens')
    console.print(table)
    if options.json:
        print(json.dumps({'benchmark': 'fp8_train', 'machine': machine(), 'rows': found}))


if __name__ == '__main__':
    main()
