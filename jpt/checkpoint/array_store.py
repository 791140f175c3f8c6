"""Single arrays inside a stored state, read and written in parts by tensorstore, which Orbax itself stands on.

Orbax reads and saves whole leaves. A leaf holds a weight of all layers at once, up to tens of gigabytes, so a
conversion that must stay near the size of one tensor goes below it: Orbax's partial save creates the state with the
first rows of every leaf, and the other rows are appended here. The result is what Orbax would have written, with
chunks of the size of the blocks, and Orbax restores it.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jpt.checkpoint.source import BLOCK_BYTES, row_blocks
from jpt.checkpoint.tree import nest, parts_of


class Streamed(NamedTuple):
    """A leaf to be written in parts: its shape and dtype, and how to read its rows [first, last).

    beside: the name of a leaf with as many rows, of which the same are read and written just before.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]
    beside: str | None = None


def open_array(state: Path, name: str, *, writable: bool = False) -> Any:
    """The tensorstore of a leaf in the state directory; `store[rows].read().result()` gives a part as numpy."""
    import tensorstore as ts

    spec = {
        'driver': 'zarr3',
        'kvstore': {
            'driver': 'ocdbt',
            'base': {'driver': 'file', 'path': f'{state.absolute()}/'},
            'path': '.'.join(parts_of(name)) + '/',
        },
        'store_data_equal_to_fill_value': True,  # as Orbax does: a chunk of zeros is data, an absent chunk is damage
    }
    return ts.open(spec, open=True, read=True, write=writable).result()


def write_state(directory: Path, leaves: Mapping[str, Streamed], report: Callable[[str, int], Any]) -> None:
    """Writes `directory`/state with one block of one leaf in memory at a time.

    Args:
        directory: exists, without a state.
        leaves: what to write, by name.
        report: called with the name and the bytes of each block that is written.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    partial = directory / 'partial'
    context = ocp.Context()
    context.array.saving.use_compression = False
    blocks: dict[str, list[slice]] = {}
    waiting: dict[str, np.ndarray] = {}  # a save costs some 50 ms, so small leaves go together
    with context:
        for number, (name, leaf) in enumerate(leaves.items(), start=1):
            own = list(row_blocks(leaf.shape, leaf.dtype.itemsize))
            blocks[name] = own if leaf.beside is None else blocks[leaf.beside]
            waiting[name] = leaf.read(blocks[name][0])
            report(name, waiting[name].nbytes)
            if sum(block.nbytes for block in waiting.values()) > BLOCK_BYTES or number == len(leaves):
                ocp.partial.save(partial, nest(waiting))
                waiting.clear()
        ocp.partial.finalize(partial)
    (partial / 'state').rename(directory / 'state')
    _remove_files(partial)
    for name, leaf in leaves.items():
        if leaf.beside is None and len(blocks[name]) > 1:
            together = {name: leaf} | {other: each for other, each in leaves.items() if each.beside == name}
            _append(directory / 'state', together, blocks[name][1:], report)


def _append(
    state: Path, leaves: Mapping[str, Streamed], blocks: Iterable[slice], report: Callable[[str, int], Any]
) -> None:
    """Writes the blocks of rows that follow the first, of leaves that go together."""
    stores = {
        name: open_array(state, name, writable=True).resize(exclusive_max=list(leaf.shape)).result()
        for name, leaf in leaves.items()
    }
    for rows in blocks:
        for name, leaf in leaves.items():
            block = leaf.read(rows)
            stores[name][rows].write(block).result()
            report(name, block.nbytes)


def _remove_files(directory: Path) -> None:
    """Removes what Orbax leaves beside the state: its own description of the step."""
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
