"""Formats chosen per layer under a budget of bits, beside other choices of as many bits.

    python benchmarks/quantize_auto.py --rows=64 --json

For every budget: what `auto` chooses by gradients and by trying, formats by alternate layers, the widest format for the
first and last layers, and choices at random: groups of weights in random order get the widest format as long as the
budget lasts. The model is computed in float32, so what is measured is the quantization alone: KL of the original to the
quantized model on held-out text, nats per token. `predicted` is the sum of sensitivities that a choice was made by.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from timing import machine

import jpt
from jpt.data.batch import Batch
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from
from jpt.model import Model
from jpt.models.splitting import places, restacked, split
from jpt.quant.dot import is_weight
from jpt.quant.paths import map_with_path, paths
from jpt.quant.recipes import chosen, recipe_of
from jpt.quantization.auto import Automatic, automatic
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.run import measured
from jpt.quantization.sensitivity import Group, groups_by_layer
from jpt.quantization.settings import AutoConfig, CalibrationConfig

Choice = list[str]  # the format of every group


class Mixed:
    """A model in formats by group, put together from the model in each of them."""

    def __init__(self, model: Model, names: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model, self.names = model, names
        formats = {name: chosen(model.params, recipe_of(name)) for name in names}
        self.trees = {name: calibrated_params(model, formats[name], batches, CalibrationConfig()) for name in names}
        self.groups = groups_by_layer(model.config, formats[names[0]])
        leaves = dict(zip(paths(model.params), jax.tree.leaves(model.params), strict=True))
        self.sizes = [sum(int(np.prod(leaves[path].shape[1:])) for path in group.paths) for group in self.groups]
        self.bits = {
            name: [
                sum(formats[name][p].bits(leaves[p].shape) * leaves[p][0].size for p in g.paths) for g in self.groups
            ]
            for name in names
        }

    def bits_of(self, choice: Choice) -> float:
        """Bits of a weight."""
        return sum(self.bits[name][at] for at, name in enumerate(choice)) / sum(self.sizes)

    def made(self, choice: Choice) -> Model:
        """The model."""
        marks: list[list[tuple[str, str]]] = [[] for _ in range(self.model.config.num_layers)]
        by_path: dict[tuple[int, str], str] = {}
        for group, name in zip(self.groups, choice, strict=True):
            marks[group.layer].append((group.name, name))
            by_path |= {(group.layer, path.split('/', 2)[2]): name for path in group.paths}
        cfg = split(self.model.config, [tuple(mark) for mark in marks])
        numbers = {f'{segment}.{kind}': n for n, ((segment, kind), _) in reversed(list(enumerate(places(cfg))))}
        trees = {name: restacked(self.model.config, tree, cfg) for name, tree in self.trees.items()}

        def one(path: str, *leaves: Any) -> Any:
            top, place, *rest = (*path.split('/', 2), '')[:3]
            name = by_path.get((numbers[place], rest[0])) if top == 'layers' else None
            return leaves[self.names.index(name) if name else 0]

        params = map_with_path(one, *(trees[name] for name in self.names), is_leaf=is_weight)
        return Model(cfg, params, self.model.tokenizer)


def filled(mixed: Mixed, order: Sequence[int], bits: float) -> Choice:
    """The narrowest format for all, and the widest for groups in this order as long as the budget lasts."""
    narrow, wide = mixed.names
    choice = [narrow] * len(mixed.groups)
    for at in order:
        tried = [*choice[:at], wide, *choice[at + 1 :]]
        choice = tried if mixed.bits_of(tried) <= bits else choice
    return choice


def by_layers(groups: Sequence[Group], layers: Sequence[int]) -> list[int]:
    """The groups of layers in this order."""
    return [at for layer in layers for at, group in enumerate(groups) if group.layer == layer]


def choices(mixed: Mixed, found: dict[str, Automatic], bits: float, random: int) -> dict[str, Choice]:
    """All that are compared, by name."""
    last = mixed.model.config.num_layers - 1
    alternate = [*range(0, last + 1, 2), *range(1, last + 1, 2)]
    ends = sorted(range(last + 1), key=lambda layer: min(layer, last - layer))
    rng = np.random.default_rng(0)
    made = {name: [each.chosen for each in one.groups] for name, one in found.items()}
    made['alternate layers'] = filled(mixed, by_layers(mixed.groups, alternate), bits)
    made['first and last layers'] = filled(mixed, by_layers(mixed.groups, ends), bits)
    for at in range(random):
        made[f'random {at}'] = filled(mixed, [int(n) for n in rng.permutation(len(mixed.groups))], bits)
    return made


def main() -> None:
    """Runs all and prints the table, and with --json one line of JSON at the end."""
    parser = argparse.ArgumentParser(description='Formats chosen per layer beside other choices of as many bits.')
    parser.add_argument('--model', default='quickstart')
    parser.add_argument('--calibration', default='stdlib:train')
    parser.add_argument('--held_out', default='stdlib:held_out')
    parser.add_argument('--rows', type=int, default=64, help='to calibrate on, and to measure on')
    parser.add_argument('--length', type=int, default=0, help='tokens of a row; 0: as the model has')
    parser.add_argument('--formats', nargs=2, default=['nvfp4', 'fp8_tensor'], help='the narrow and the wide one')
    parser.add_argument('--bits', nargs='+', type=float, default=[5.0, 6.0, 7.0])
    parser.add_argument('--scores', nargs='+', default=['gradient', 'kl'])
    parser.add_argument('--random', type=int, default=10, help='choices at random for each budget')
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    model = jpt.load(options.model, dtype='float32')
    sizes = {'rows': options.rows, 'length': options.length}
    text = TextConfig.of_files(options.calibration, options.held_out, **sizes)
    batches, held_out = batches_from(model, text)
    mixed = Mixed(model, options.formats, batches)
    rows: list[dict[str, Any]] = []

    def add(budget: float | None, name: str, choice: Choice, predicted: float | None, seconds: float | None) -> None:
        told = measured(name, mixed.made(choice), model, held_out)
        row = {'budget': budget, 'choice': name, 'bits': mixed.bits_of(choice), 'kl': told.kl}
        rows.append(row | {'perplexity': told.perplexity, 'predicted': predicted, 'seconds': seconds})
        print(rows[-1], flush=True)

    for name in options.formats:
        add(None, name, [name] * len(mixed.groups), None, None)
    for bits in options.bits:
        found, seconds = {}, {}
        for score in options.scores:
            start, how = time.monotonic(), AutoConfig(tuple(options.formats), bits, score)
            found[f'auto, {score}'] = automatic(model, (('layers/**', options.formats[0]),), batches, how)
            seconds[f'auto, {score}'] = time.monotonic() - start
        for name, choice in choices(mixed, found, bits, options.random).items():
            add(bits, name, choice, found[name].sensitivity if name in found else None, seconds.get(name))
    console = Console(width=160)
    console.print(f'{machine()}; {options.model}, {options.rows} rows of text')
    show(rows, console)
    if options.json:
        print(json.dumps({'benchmark': 'quantize_auto', 'machine': machine(), 'rows': rows}))


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A row per choice; those at random as the least, the median and the largest of them."""
    table = Table('budget', 'choice', 'bits', 'KL', 'predicted', 'perplexity', 'seconds', box=box.MARKDOWN)
    for budget in dict.fromkeys(row['budget'] for row in rows):
        some = [row for row in rows if row['budget'] == budget]
        drawn = sorted((row for row in some if row['choice'].startswith('random')), key=lambda row: row['kl'])
        named = [row for row in some if not row['choice'].startswith('random')]
        if drawn:
            middle = drawn[len(drawn) // 2]
            picked = ('least', drawn[0]), ('median', middle), ('largest', drawn[-1])
            named += [row | {'choice': f'random, the {which} of {len(drawn)}'} for which, row in picked]
        for row in named:
            predicted, seconds = (row[name] for name in ('predicted', 'seconds'))
            table.add_row(
                '' if budget is None else f'{budget:g}',
                row['choice'],
                f'{row["bits"]:.3f}',
                f'{row["kl"]:.5f}',
                '' if predicted is None else f'{predicted:.5f}',
                f'{row["perplexity"]:.3f}',
                '' if seconds is None else f'{seconds:.0f}',
            )
    console.print(table)


if __name__ == '__main__':
    main()
