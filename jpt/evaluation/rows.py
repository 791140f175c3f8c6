"""Rows of a task file: JSON lines, plain or compressed."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPENERS: dict[str, Callable[..., Any]] = {'.gz': gzip.open, '.xz': lzma.open}


def read_rows(path: str | Path, limit: int = 0) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines (.jsonl, also .gz and .xz), the first `limit` of them if that is not 0.

    Raises:
        ValueError: a line that is not a JSON object, by file and line.
    """
    rows: list[dict[str, Any]] = []
    with OPENERS.get(Path(path).suffix, open)(path, 'rt', encoding='utf-8') as file:
        for number, line in enumerate(file, start=1):
            if limit and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f'{path}:{number}: not JSON: {error}') from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}:{number}: expected a JSON object, found {type(row).__name__}')
            rows.append(row)
    return rows
