"""What the teacher is worth to the quickstart's student, over several seeds.

    python benchmarks/quickstart_seeds.py --seeds=3 --json

Runs configs/quickstart.py once per seed (weights and order of the data; both students of a run share them), each in a
process and a folder of its own, and prints the held-out scores, and by how much the distilled student is ahead of the
one trained from scratch: mean over the seeds, and the smallest. A run that was killed goes on where it was.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MEASURES = {'loss': -1, 'kl': -1, 'agreement': 1}  # which way is better


def run_seed(seed: int, workdir: Path, overrides: list[str]) -> dict[str, Any]:
    """Runs the job for one seed and returns {'seed', 'seconds', 'scores': {model: {measure: value}}}."""
    command = [sys.executable, '-m', 'jpt.train', '--config=configs/quickstart.py', f'--workdir={workdir}']
    start = time.monotonic()
    subprocess.run([*command, f'--config.seed={seed}', *overrides], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    rows = json.loads((workdir / 'comparison.json').read_text())
    return {'seed': seed, 'seconds': seconds, 'scores': {row['model']: row for row in rows}}


def margins(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each measure by how much the distilled student is better than from scratch: mean and least over the runs."""
    result = {}
    for name, sign in MEASURES.items():
        ahead = [sign * (run['scores']['distilled'][name] - run['scores']['from scratch'][name]) for run in runs]
        result[name] = {'mean': sum(ahead) / len(ahead), 'least': min(ahead)}
    return result


def show(runs: list[dict[str, Any]], ahead: dict[str, dict[str, float]], console: Console) -> None:
    """Prints one row per seed and model, and the margins."""
    table = Table('seed', 'model', 'loss', 'KL to teacher', 'top-1 agreement', 'minutes')
    for run in runs:
        for model, row in run['scores'].items():
            scores = (f'{row["loss"]:.4f}', f'{row["kl"]:.4f}', f'{100 * row["agreement"]:.2f} %')
            table.add_row(str(run['seed']), model, *scores, f'{run["seconds"] / 60:.1f}')
    for kind in ('mean', 'least'):
        loss, kl, agreement = (ahead[name][kind] for name in MEASURES)
        table.add_row('', f'distilled is better by, {kind}', f'{loss:.4f}', f'{kl:.4f}', f'{100 * agreement:.2f}', '')
    console.print(table)


def main() -> None:
    """Runs every seed and prints the table, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='The quickstart over several seeds.')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--workdir', type=Path, default=Path('out/quickstart_seeds'))
    parser.add_argument('--json', action='store_true')
    options, overrides = parser.parse_known_args()
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    runs = [run_seed(seed, options.workdir / f'seed_{seed}', overrides) for seed in range(options.seeds)]
    ahead = margins(runs)
    packages = ', '.join(f'{name} {version(name)}' for name in ('jax', 'flax'))
    machine = f'{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {packages}'
    console = Console(width=120)
    console.print(machine)
    show(runs, ahead, console)
    if options.json:
        print(json.dumps({'benchmark': 'quickstart_seeds', 'machine': machine, 'runs': runs, 'margins': ahead}))


if __name__ == '__main__':
    main()
