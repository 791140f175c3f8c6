"""Executes every notebook from top to bottom; an exception in a cell is a failure."""

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the notebooks and returns how many there were wrong."""
    found = sorted((ROOT / 'notebooks').glob('*.ipynb'))
    if not found:
        print('no notebooks found')
        return 1
    for path in found:
        start = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': ROOT}}).execute()
        print(f'{path.name}: {len(notebook.cells)} cells, {time.monotonic() - start:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
