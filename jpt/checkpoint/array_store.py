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
    """A leaf to be written in parts: its shape and dtype, and how to read its rows [first, last)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice], np.ndarray]


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
    rest: dict[str, list[slice]] = {}
    waiting: dict[str, np.ndarray] = {}  # a save costs some 50 ms, so small leaves go together
    with context:
        for number, (name, leaf) in enumerate(leaves.items(), start=1):
            first, *rest[name] = row_blocks(leaf.shape, leaf.dtype.itemsize)
            waiting[name] = leaf.read(first)
            report(name, waiting[name].nbytes)
            if sum(block.nbytes for block in waiting.values()) > BLOCK_BYTES or number == len(leaves):
                ocp.partial.save(partial, nest(waiting))
                waiting.clear()
        ocp.partial.finalize(partial)
    (partial / 'state').rename(directory / 'state')
    _remove_files(partial)
    for name, blocks in rest.items():
        if blocks:
            _append(directory / 'state', name, leaves[name], blocks, report)


def _append(state: Path, name: str, leaf: Streamed, blocks: Iterable[slice], report: Callable[[str, int], Any]) -> None:
    store = open_array(state, name, writable=True).resize(exclusive_max=list(leaf.shape)).result()
    for rows in blocks:
        block = leaf.read(rows)
        store[rows].write(block).result()
        report(name, block.nbytes)


def _remove_files(directory: Path) -> None:
    """Removes what Orbax leaves beside the state: its own description of the step."""
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
