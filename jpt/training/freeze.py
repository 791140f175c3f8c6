"""Trainable and frozen leaves: one tree split in two of the same structure, with None where the other has the leaf."""

from collections.abc import Sequence
from typing import Any

import jax

from jpt.models.cache import CACHE_SCALES
from jpt.quant.paths import map_with_path, paths, select
from jpt.quant.tensors import STATIC, QTensor


def partition(params: Any, frozen: Sequence[str], place: str = 'freeze') -> tuple[Any, Any]:
    """Splits params into (trainable, frozen) by path patterns (see jpt.quant.paths); `merge` puts them together again.

    A pattern that starts with '!' takes back what earlier ones froze: ('**', '!lm_head') trains the head alone. Codes
    cannot be trained, so quantized weights are frozen whatever the patterns say, and so are scales that
    calibration found, and those of a cache.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """
    among = paths(params, _is_quantized)
    chosen: frozenset[str] = frozenset()
    for pattern in frozen:
        if pattern.startswith('!'):
            chosen -= select([pattern[1:]], among, place)
        else:
            chosen |= select([pattern], among, place)
    leaves = jax.tree.leaves(params, is_leaf=_is_quantized)
    chosen |= {path for path, leaf in zip(among, leaves, strict=True) if _is_quantized(leaf)}
    chosen |= {path for path in among if path.split('/')[-1] in (*STATIC, *CACHE_SCALES)}
    if len(chosen) == len(among):
        raise ValueError(f'{place}={tuple(frozen)}: nothing is left to train')
    trainable = map_with_path(lambda path, leaf: None if path in chosen else leaf, params, is_leaf=_is_quantized)
    frozen_leaves = map_with_path(lambda path, leaf: leaf if path in chosen else None, params, is_leaf=_is_quantized)
    return trainable, frozen_leaves


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


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
