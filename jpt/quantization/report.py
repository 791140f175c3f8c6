"""What a quantization cost: tables for the console, a JSON file, and a plot of all layers."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from jpt.kernels.low_precision import E4M3_MAX
from jpt.quant.formats import name_of_format
from jpt.quantization.auto_report import auto_json, show_auto
from jpt.quantization.kv_cache import CacheReport
from jpt.quantization.run import LayerReport, ModelReport, Quantized
from jpt.quantization.settings import CalibrationConfig

JSON_FILE, PLOT_FILE = 'quantize.json', 'quantize.png'
WORST = 10  # layers that the console shows


def show(made: Quantized, console: Console) -> None:
    """The model before and after, and the layers whose outputs suffer most."""
    if made.auto is not None:
        show_auto(made.auto, console)
    table = Table('model', 'MB', 'perplexity', 'loss', 'KL to the original', 'same top word', box=box.MARKDOWN)
    for row in made.models:
        cells = f'{row.bytes / 1e6:.2f}', f'{row.perplexity:.3f}', f'{row.loss:.4f}', f'{row.kl:.5f}'
        table.add_row(row.name, *cells, f'{100 * row.agreement:.2f} %')
    console.print(table)
    if made.cache is not None:
        _show_cache(made.cache, console)
    if made.layers:
        shown = min(WORST, len(made.layers))
        console.print(f'the {shown} worst of {len(made.layers)} weights, by the output of their layer')
        _show_layers(made.layers, console)
    console.print(f'not quantized: {", ".join(made.kept)}')
    for layer, experts in made.unseen.items():
        console.print(
            f'layer {layer}: no token of calibration went to experts {", ".join(map(str, experts))}: they are '
            f'calibrated by their weights alone'
        )


def _show_cache(cache: CacheReport, console: Console) -> None:
    before, after = cache.bytes
    console.print(
        f'keys and values: {cache.format}, {before} bytes per token -> {after}; the largest of {len(cache.tensors)}'
    )
    table = Table('layer', 'kept', 'amax', 'scale', 'clipped', box=box.MARKDOWN)
    for one in cache.tensors[:WORST]:
        table.add_row(str(one.layer), one.name, f'{one.amax:.4g}', f'{one.scale:.4g}', 'yes' if one.beyond else 'no')
    console.print(table)


def _show_layers(layers: Sequence[LayerReport], console: Console) -> None:
    table = Table('layer', 'weight', 'format', 'weight error', 'output SNR', 'clipped', 'amax', box=box.MARKDOWN)
    for one in layers[:WORST]:
        snr = 'not measured' if one.snr is None else f'{one.snr:.1f} dB'
        values = f'{100 * one.error:.2f} %', snr, f'{100 * one.clipped:.3f} %', f'{one.amax:.4g}'
        table.add_row(str(one.layer), short(one.path), name_of_format(one.format), *values)
    console.print(table)


class Streamed(NamedTuple):
    """What is known of a model that was quantized from files to files, without text."""

    layers: list[LayerReport]
    bytes: tuple[int, int]  # of all weights, before and after
    kept: list[str]  # matrices that were not quantized
    how: CalibrationConfig


def show_streamed(made: Streamed, console: Console) -> None:
    """The sizes, and the weights that lost most."""
    before, after = made.bytes
    console.print(f'{before / 1e6:,.2f} MB of weights became {after / 1e6:,.2f} MB ({100 * after / before:.1f} %)')
    console.print(f'the {min(WORST, len(made.layers))} worst of {len(made.layers)} weights, by their own error')
    _show_layers(made.layers, console)
    console.print(f'not quantized: {", ".join(made.kept)}')


def write_streamed(made: Streamed, directory: Path) -> None:
    """The JSON file, with the fields of `to_json` that need no text."""
    names = ('original', 'quantized')
    content = {
        'models': [{'name': name, 'bytes': size} for name, size in zip(names, made.bytes, strict=True)],
        'calibration_tokens': 0,
        'calibration': dataclasses.asdict(made.how),
        'layers': [_row(row) for row in made.layers],
        'not_quantized': made.kept,
    }
    (directory / JSON_FILE).write_text(json.dumps(content, indent=1) + '\n', 'utf-8')


def to_json(made: Quantized) -> dict[str, Any]:
    """All of the report."""
    return {
        'models': [row._asdict() | {'perplexity': row.perplexity} for row in made.models],
        'calibration_tokens': made.tokens,
        'experts_without_tokens': {str(layer): experts for layer, experts in made.unseen.items()},
        'calibration': dataclasses.asdict(made.how),
        'text': None if made.text is None else dataclasses.asdict(made.text),
        'layers': [_row(row) for row in made.layers],
        'not_quantized': made.kept,
        'kv_cache': None if made.cache is None else _cache_row(made.cache),
        'auto': None if made.auto is None else auto_json(made.auto),
    }


def _cache_row(cache: CacheReport) -> dict[str, Any]:
    before, after = cache.bytes
    tensors = [one._asdict() | {'clipped': one.beyond} for one in cache.tensors]
    return {'format': cache.format, 'bytes_per_token': {'original': before, 'quantized': after}, 'tensors': tensors}


def _row(row: LayerReport) -> dict[str, Any]:
    """A layer as JSON, which has no numbers that are not finite: None, as where nothing was measured."""
    snr = row.snr if row.snr is not None and math.isfinite(row.snr) else None
    return row._asdict() | {'format': dataclasses.asdict(row.format), 'snr': snr}


def write(made: Quantized, directory: Path) -> None:
    """The JSON file and the plot."""
    (directory / JSON_FILE).write_text(json.dumps(to_json(made), indent=1) + '\n', 'utf-8')
    if made.layers:
        plot(made.layers, made.models, directory / PLOT_FILE)
    elif made.cache is not None:
        plot_cache(made.cache, made.models, directory / PLOT_FILE)


def plot_cache(cache: CacheReport, models: Sequence[ModelReport], path: Path) -> None:
    """The largest keys and values of every layer, and the largest that their scales hold."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout='constrained')
    axes = figure.subplots()
    for name in dict.fromkeys(sorted(one.name for one in cache.tensors)):
        rows = sorted((one for one in cache.tensors if one.name == name), key=lambda one: one.layer)
        numbers = [one.layer for one in rows]
        axes.plot(numbers, [one.amax for one in rows], marker='o', markersize=3, label=f'{name}: largest seen')
        axes.plot(numbers, [E4M3_MAX * one.scale for one in rows], linestyle=':', label=f'{name}: largest held')
    original, quantized = models
    axes.set_title(f'perplexity {original.perplexity:.3f} -> {quantized.perplexity:.3f}, KL {quantized.kl:.5f}')
    axes.set_xlabel('layer')
    axes.set_ylabel('absolute value')
    axes.set_yscale('log')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize='small')
    figure.savefig(path, dpi=120)


def plot(layers: Sequence[LayerReport], models: Sequence[ModelReport], path: Path) -> None:
    """Error of every weight and of its layer's output, over the layers; a line per kind of weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True)
    for name in dict.fromkeys(short(row.path) for row in sorted(layers, key=lambda row: row.path)):
        rows = sorted((row for row in layers if short(row.path) == name), key=lambda row: row.layer)
        above.plot([row.layer for row in rows], [100 * row.error for row in rows], marker='o', markersize=3, label=name)
        told = [(row.layer, row.snr) for row in rows if row.snr is not None and math.isfinite(row.snr)]
        if told:
            below.plot(*zip(*told, strict=True), marker='o', markersize=3, label=name)
    original, quantized = models
    above.set_title(f'perplexity {original.perplexity:.3f} -> {quantized.perplexity:.3f}, KL {quantized.kl:.5f}')
    above.set_ylabel('relative error of the weight, %')
    above.set_ylim(0, 130 * max(row.error for row in layers))
    below.set_ylabel("output's signal over noise, dB")
    below.set_xlabel('layer')
    below.xaxis.get_major_locator().set_params(integer=True)
    above.legend(ncols=4, fontsize='small')
    figure.savefig(path, dpi=120)


def short(path: str) -> str:
    """'attn/q' of 'layers/0.0/attn/q/kernel'."""
    return '/'.join(path.split('/')[2:-1])
