"""What a quantization cost: tables for the console, a JSON file, and a plot of all layers."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jpt.quantization.auto_report import auto_json, show_auto
from jpt.quantization.run import LayerReport, ModelReport, Quantized

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
    console.print(
        f'the {min(WORST, len(made.layers))} worst of {len(made.layers)} weights, by the output of their layer'
    )
    table = Table('layer', 'weight', 'format', 'weight error', 'output SNR', 'clipped', 'amax', box=box.MARKDOWN)
    for one in made.layers[:WORST]:
        snr = 'not measured' if one.snr is None else f'{one.snr:.1f} dB'
        values = f'{100 * one.error:.2f} %', snr, f'{100 * one.clipped:.3f} %', f'{one.amax:.4g}'
        table.add_row(str(one.layer), short(one.path), one.format.element, *values)
    console.print(table)
    console.print(f'not quantized: {", ".join(made.kept)}')
    for layer, experts in made.unseen.items():
        console.print(
            f'layer {layer}: no token of calibration went to experts {", ".join(map(str, experts))}: they are '
            f'calibrated by their weights alone'
        )


def to_json(made: Quantized) -> dict[str, Any]:
    """All of the report."""
    return {
        'models': [row._asdict() | {'perplexity': row.perplexity} for row in made.models],
        'calibration_tokens': made.tokens,
        'experts_without_tokens': {str(layer): experts for layer, experts in made.unseen.items()},
        'calibration': dataclasses.asdict(made.how),
        'layers': [_row(row) for row in made.layers],
        'not_quantized': made.kept,
        'auto': None if made.auto is None else auto_json(made.auto),
    }


def _row(row: LayerReport) -> dict[str, Any]:
    """A layer as JSON, which has no numbers that are not finite: None, as where nothing was measured."""
    snr = row.snr if row.snr is not None and math.isfinite(row.snr) else None
    return row._asdict() | {'format': dataclasses.asdict(row.format), 'snr': snr}


def write(made: Quantized, directory: Path) -> None:
    """The JSON file and the plot."""
    (directory / JSON_FILE).write_text(json.dumps(to_json(made), indent=1) + '\n', 'utf-8')
    plot(made.layers, made.models, directory / PLOT_FILE)


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
