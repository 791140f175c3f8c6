"""What was chosen for each layer and why: a table for the console, and JSON that holds a recipe to be given back."""

import dataclasses
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jpt.quantization.auto import Automatic


def show_auto(found: Automatic, console: Console) -> None:
    """A row per layer, a column per group of weights."""
    names = list(dict.fromkeys(each.name for each in found.groups))
    table = Table('layer', *names, box=box.MARKDOWN)
    rows: dict[int, dict[str, str]] = {}
    for each in found.groups:
        cell = f'{each.chosen}, {each.sensitivity[each.chosen]:.2g}'
        rows.setdefault(each.layer, {})[each.name] = cell
    for layer, cells in rows.items():
        table.add_row(str(layer), *(cells.get(name, '') for name in names))
    console.print('formats, and the divergence that each alone would make, nats per token')
    console.print(table)
    console.print(
        f'{found.bits:.4f} bits of a weight (budget {found.how.bits:g}); divergences add up to {found.sensitivity:.3g}'
    )


def auto_json(found: Automatic) -> dict[str, Any]:
    """All of it; 'recipe' is what config.recipe takes."""
    return {
        **dataclasses.asdict(found.how),
        'recipe': found.recipe,
        'bits_chosen': found.bits,
        'sensitivity': found.sensitivity,
        'groups': [each._asdict() for each in found.groups],
    }
