"""More or fewer rows in the embedding and the unembedding, for tokens that were added to a vocabulary."""

import dataclasses
from typing import Any

import numpy as np

from jpt.checkpoint.source import Index, LeafSource, TreeSource, is_vocabulary, leaves_of, load_tree, row_blocks
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf


class ResizedSource:
    """A source whose vocabulary has another size.

    New rows are the mean of the old ones, so that a new token starts near the average logit and the probabilities of
    the others hardly move (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).

    Args:
        source: the model as it is.
        vocab_size: rows wanted.
        used: how many ids the tokenizer has; rows beyond it are padding that the mean leaves out and that may go.
        allow_cut: let rows go although their ids are, or may be, in use.

    Raises:
        ValueError: vocab_size cuts ids that are in use (or may be, where `used` is unknown), or is smaller than `used`.
    """

    def __init__(
        self, source: LeafSource, vocab_size: int, *, used: int | None = None, allow_cut: bool = False
    ) -> None:
        old = source.cfg.vocab_size
        if vocab_size < 1:
            raise ValueError(f'vocab_size={vocab_size}: expected at least 1')
        if not allow_cut and vocab_size < (old if used is None else used):
            known = f'the tokenizer has {used} ids' if used is not None else f'any of the {old} rows may be in use'
            raise ValueError(f'vocab_size={vocab_size} is too small: {known}; ask for more, or allow the cut')
        self.cfg = dataclasses.replace(source.cfg, vocab_size=vocab_size)
        self._source, self.quantized = source, source.quantized
        self._averaged = min(old, used or old)
        self._old = {leaf.path: leaf for leaf in leaves_of(source)}
        self._means: dict[Any, np.ndarray] = {}

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._source.dtype(self._old[leaf.path])

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        old = self._old[leaf.path]
        if not is_vocabulary(leaf):
            return self._source.read(old, index)
        first, last, _ = index[0].indices(leaf.shape[0])
        kept = self._source.read(old, (slice(min(first, old.shape[0]), min(last, old.shape[0])), *index[1:]))
        new = np.broadcast_to(self._mean(old)[index[1]], (last - first - len(kept), kept.shape[1]))
        return np.concatenate([kept, new.astype(kept.dtype)])

    def _mean(self, leaf: Leaf) -> np.ndarray:
        """Mean of a table's rows, summed in float64 block by block."""
        if leaf.path not in self._means:
            total = np.zeros(leaf.shape[1], np.float64)
            for rows in row_blocks((self._averaged, leaf.shape[1]), 8):
                total += self._source.read(leaf, (rows, slice(0, leaf.shape[1]))).astype(np.float64).sum(axis=0)
            self._means[leaf.path] = total / self._averaged
        return self._means[leaf.path]


def resize_vocabulary(
    cfg: ModelConfig,
    params: Any,
    vocab_size: int,
    *,
    used: int | None = None,
    allow_cut: bool = False,
    shardings: Any = None,
) -> tuple[ModelConfig, dict[str, Any]]:
    """(cfg, params) with `vocab_size` rows in embedding and unembedding; arguments and errors as `ResizedSource`."""
    source = ResizedSource(TreeSource(cfg, params), vocab_size, used=used, allow_cut=allow_cut)
    return source.cfg, load_tree(source, shardings)
