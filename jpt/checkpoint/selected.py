"""A model with some of its layers left out: where a smaller student begins."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jpt.checkpoint.source import NOT_QUANTIZED, Index, LeafSource, whole_weights
from jpt.models.config import ModelConfig, runs_of
from jpt.models.families import config_from_hf, config_to_hf
from jpt.models.names import Leaf, TreePath, leaves
from jpt.models.splitting import joined, places


class SelectedLayers:
    """A source of some of a model's layers, in the order given, with everything around them.

    Args:
        source: the whole model.
        layers: numbers of the layers that stay, ascending.

    Raises:
        ValueError: no layers, a number that is none of the model's, numbers that do not ascend, or layers that make no
            model of the family (dense layers behind ones with experts, where experts must come last).
    """

    quantized = NOT_QUANTIZED

    def __init__(self, source: LeafSource, layers: Sequence[int]) -> None:
        whole = source.cfg
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f'layers={tuple(layers)}: expected numbers that ascend, at least one')
        if layers[0] < 0 or layers[-1] >= whole.num_layers:
            raise ValueError(f'layers={tuple(layers)}: expected numbers from 0 to {whole.num_layers - 1}')
        kinds = tuple(whole.layer_kinds())
        self.cfg = dataclasses.replace(whole, segments=runs_of(tuple(kinds[layer] for layer in layers)), mtp=())
        check_described(self.cfg, f'layers={tuple(layers)}')
        self._source = whole_weights(source, f'layers={tuple(layers)}')
        self._whole = {leaf.path: leaf for leaf in leaves(whole)}
        self._before = [places(whole)[layer] for layer in layers]  # of each new layer, where it was

    def dtype(self, leaf: Leaf) -> np.dtype:
        """That of the whole model's leaf; of several layers, the one that holds all."""
        return np.result_type(*(self._source.dtype(one) for one, _ in self._parts(leaf)))

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf, layer by layer from where they are in the whole model."""
        if leaf.path[0] != 'layers':
            return self._source.read(self._whole[leaf.path], index)
        parts, rest = self._parts(leaf), index[1:]
        wanted = range(*index[0].indices(leaf.shape[0]))
        read = [self._source.read(parts[i][0], (slice(parts[i][1], parts[i][1] + 1), *rest)) for i in wanted]
        shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
        return np.concatenate(read).astype(self.dtype(leaf)) if read else np.empty(shape, self.dtype(leaf))

    def _parts(self, leaf: Leaf) -> list[tuple[Leaf, int]]:
        """Of every layer of a leaf: the leaf of the whole model that has it, and its place there."""
        if leaf.path[0] != 'layers':
            return [(self._whole[leaf.path], 0)]
        segment, kind, *inner = leaf.path[1:]
        numbers = [self.cfg.layer_index(int(segment), int(kind), repeat) for repeat in range(leaf.shape[0])]
        found = []
        for number in numbers:
            (old_segment, old_kind), repeat = self._before[number]
            path: TreePath = ('layers', old_segment, old_kind, *inner)
            found.append((self._whole[path], repeat))
        return found


def check_described(cfg: ModelConfig, asked: str) -> None:
    """Raises ValueError, which begins with what was `asked`, where config.json cannot say what the model computes."""
    try:
        again = config_from_hf(config_to_hf(cfg))
    except (ValueError, StopIteration) as error:
        raise ValueError(f'{asked}: make no model of {cfg.family}: {error}') from error
    if again != dataclasses.replace(joined(cfg), kv_cache='as_computed'):
        raise ValueError(f'{asked}: make no model of {cfg.family} that its config.json can describe')
