"""A model with a PEFT adapter merged into it, as a source of leaves."""

import json
from pathlib import Path

import numpy as np

from jpt.checkpoint.hf_import import is_hf_directory
from jpt.checkpoint.peft import ADAPTER_CONFIG, read_factors
from jpt.checkpoint.source import NOT_QUANTIZED, Index, LeafSource, merged, whole_weights
from jpt.models.names import Leaf


class AdaptedSource:
    """The model of `source` with the adapter of a PEFT directory merged into its kernels, in their dtype.

    Raises:
        FileNotFoundError, ValueError: as `read_factors`; or quantized weights, into which nothing is merged.
    """

    quantized = NOT_QUANTIZED

    def __init__(self, source: LeafSource, adapter: Path) -> None:
        self.cfg = source.cfg
        self._source, self._factors = whole_weights(source, str(adapter)), read_factors(adapter, source.cfg)

    def dtype(self, leaf: Leaf) -> np.dtype:
        """That of the model without the adapter."""
        return self._source.dtype(leaf)

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf, with the adapter where it has one."""
        base = self._source.read(leaf, index)
        if leaf.path not in self._factors:
            return base
        repeats, rows, columns = index
        a, b, scale = self._factors[leaf.path]
        return merged(base, a[repeats, :, columns], b[repeats, rows], scale)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no model of its own."""
    return (directory / ADAPTER_CONFIG).is_file() and not is_hf_directory(directory)


def named_base(directory: Path) -> str:
    """The base_model_name_or_path of a PEFT adapter.

    Raises:
        ValueError: it names none.
    """
    path = directory / ADAPTER_CONFIG
    name = json.loads(path.read_text('utf-8')).get('base_model_name_or_path')
    if not isinstance(name, str) or not name:
        raise ValueError(f'{path}: base_model_name_or_path={name!r}: expected the directory of the model it belongs to')
    return name
