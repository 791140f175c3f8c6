"""Trainable and frozen leaves: one tree split in two of the same structure, with None where the other has the leaf."""

from collections.abc import Sequence
from typing import Any

import jax

from jpt.quant.paths import map_with_path, paths, select


def partition(params: Any, frozen: Sequence[str], place: str = 'freeze') -> tuple[Any, Any]:
    """Splits params into (trainable, frozen) by path patterns (see jpt.quant.paths); `merge` puts them together again.

    A pattern that starts with '!' takes back what earlier ones froze: ('**', '!lm_head') trains the head alone.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    among = paths(params)
    chosen: frozenset[str] = frozenset()
    for pattern in frozen:
        if pattern.startswith('!'):
            chosen -= select([pattern[1:]], among, place)
        else:
            chosen |= select([pattern], among, place)
    if len(chosen) == len(among):
        raise ValueError(f'{place}={tuple(frozen)}: nothing is left to train')
    trainable = map_with_path(lambda path, leaf: None if path in chosen else leaf, params)
    return trainable, map_with_path(lambda path, leaf: leaf if path in chosen else None, params)


def merge(trainable: Any, frozen: Any) -> Any:
    """Puts two trees of the same structure together, each leaf from the one that has it.

    Raises:
        ValueError: a leaf that both have.
    """

    def pick(one: Any, other: Any) -> Any:
        if one is not None and other is not None:
            raise ValueError('merge: a leaf is in both trees')
        return other if one is None else one

    return jax.tree.map(pick, trainable, frozen, is_leaf=lambda leaf: leaf is None)
