"""A short name of a model's content, to tell two models apart without reading either whole."""

import hashlib
import itertools
import json

import numpy as np

from jpt.checkpoint.about import model_to_json
from jpt.checkpoint.source import LeafSource, leaves_of

LOOKS = 4  # places of an axis that are looked at
LATER = {'kv_cache': 'as_computed'}  # fields that configs have got since, and what leaves older fingerprints alone


def fingerprint_of(source: LeafSource) -> str:
    """A hash of a model's config and of some rows of every leaf, of every layer: 16 hexadecimal digits.

    Training changes every row that it reaches, so two models differ here but for changes of other rows alone.
    """
    fields = model_to_json(source.cfg).items()
    config = {name: value for name, value in fields if name not in LATER or value != LATER[name]}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for leaf in leaves_of(source):
        axes = [_places(size, LOOKS) for size in leaf.shape[:-1]]
        if leaf.path[0] == 'layers' and axes:
            axes[0] = list(range(leaf.shape[0]))
        for place in itertools.product(*axes):
            index = (*(slice(at, at + 1) for at in place), slice(0, leaf.shape[-1]))
            digest.update(np.ascontiguousarray(source.read(leaf, index)).tobytes())
    return digest.hexdigest()[:16]


def _places(size: int, count: int) -> list[int]:
    """Places from the first to the last, evenly apart."""
    return sorted({round(at * (size - 1) / max(count - 1, 1)) for at in range(count)})
