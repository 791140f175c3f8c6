"""A model whose norms have other scales, each a multiple of what it was."""

from collections.abc import Mapping, Sequence

import numpy as np

from jpt.checkpoint.source import NOT_QUANTIZED, Index, LeafSource, whole_weights
from jpt.models.names import Leaf


class ScaledNorms:
    """A source of which some norms return a multiple of what they did.

    Args:
        source: the model.
        factors: by the name of the norm: 'attn_norm' or 'mlp_norm' with a factor for every layer, 'final_norm' with
            one. A norm multiplies by offset + scale; the scale becomes factor * (offset + scale) - offset.
    """

    quantized = NOT_QUANTIZED

    def __init__(self, source: LeafSource, factors: Mapping[str, Sequence[float]]) -> None:
        self.cfg = source.cfg
        self._source, self._factors = whole_weights(source, 'norms of other scales'), factors

    def dtype(self, leaf: Leaf) -> np.dtype:
        """As it was."""
        return self._source.dtype(leaf)

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf, rounded to its dtype."""
        values = self._source.read(leaf, index)
        factors = self._factors.get(str(leaf.path[-2]))
        if factors is None or leaf.path[-1] != 'scale':
            return values
        column = np.asarray(factors, np.float64)
        if leaf.path[0] == 'layers':
            segment, kind = int(leaf.path[1]), int(leaf.path[2])
            repeats = range(*index[0].indices(leaf.shape[0]))
            column = column[[self.cfg.layer_index(segment, kind, repeat) for repeat in repeats]][:, None]
        offset = self.cfg.norm_offset
        return (column * (offset + values.astype(np.float64)) - offset).astype(values.dtype)
