"""Some windows of a large text source, drawn at random: enough to calibrate or to follow a loss."""

from collections.abc import Callable, Sequence

import numpy as np

from jpt.data.sources import Source
from jpt.evaluation.windows import windows

Row = tuple[int, np.ndarray, int]


def sampled_rows(
    source: Source, encode: Callable[[str], Sequence[int]], count: int, length: int, seed: int
) -> list[Row]:
    """`count` windows of at most length + 1 tokens, as `windows.batches_of` takes them; fewer where there are no more.

    Of a source with at least as many texts, each window is of another text. All are drawn by the seed.

    Raises:
        ValueError: a conversation, or no text has two tokens.
    """
    rng = np.random.default_rng(seed)
    texts = len(source)
    found: list[Row] = []
    for number in rng.permutation(texts):
        record = source[int(number)]
        if not isinstance(record, str | np.ndarray):
            raise ValueError(f'{source.place(int(number))}: expected a text, not a conversation')
        ids = encode(record) if isinstance(record, str) else record.tolist()
        rows = [(int(number), *window) for window in windows(ids, length, 0)]
        found += [rows[rng.integers(len(rows))]] if rows and texts >= count else rows
        if texts >= count and len(found) == count:
            break
    if not found:
        raise ValueError(f'{source.name}: no text has two tokens or more')
    return [found[i] for i in sorted(rng.permutation(len(found))[:count])]
