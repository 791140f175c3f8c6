"""Reading Hugging Face directories: config.json, *.safetensors in one or many files, tied weights, any stored dtype."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jpt.checkpoint.assets import CONFIG_FILE
from jpt.checkpoint.dtypes import cast_target, is_floating
from jpt.checkpoint.mxfp4 import PackedReader
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.shards import INDEX_FILE, SINGLE_FILE, ShardedReader
from jpt.checkpoint.source import Index, load_tree, whole
from jpt.checkpoint.tree import listing
from jpt.models.config import ModelConfig
from jpt.models.families import config_from_hf
from jpt.models.names import Leaf, Source, TreePath, leaves

# Buffers that older versions of transformers stored and recomputed: rotary frequencies, GPT-2's causal masks.
RECOMPUTED = re.compile(r'(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)')
HEAD = 'lm_head.weight'


def is_hf_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a Hugging Face model: config.json with safetensors beside it."""
    directory = Path(path)
    weights = (SINGLE_FILE, INDEX_FILE)
    return (directory / CONFIG_FILE).is_file() and any((directory / name).is_file() for name in weights)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        FileNotFoundError, ValueError: absent, or not a JSON object.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f'{directory} is not a Hugging Face model: it has no {CONFIG_FILE}')
    try:
        content = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a JSON object, found {type(content).__name__}')
    return content


class HuggingFaceSource:
    """A Hugging Face directory as a source of leaves. Everything but the values is checked when it is opened.

    Args:
        path: the directory.
        dtype: cast floating-point weights to this; None keeps what is stored, tensor by tensor. The layers of one leaf
            must then agree, since they are stacked. Matrices in MXFP4 (see mxfp4.py) count as bfloat16, which holds
            them exactly.

    Raises:
        FileNotFoundError: no config or no safetensors (pickled weights are refused by name).
        ValueError: a config that jpt does not compute; missing, unexpected or wrongly shaped tensors, by name; layers
            of one leaf in different dtypes.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: DTypeLike | None = None) -> None:
        self.directory = Path(path)
        self._target = cast_target(dtype)
        try:
            config = read_config(self.directory)
            self.cfg = config_from_hf(config)
        except ValueError as error:
            raise ValueError(f'{self.directory}: {error}') from error
        # Only MXFP4 has been let through, and only where a family has it.
        packed = config.get('quantization_config') is not None
        self.reader = (PackedReader if packed else ShardedReader)(self.directory)
        self._names = resolve_names(self.cfg, self.reader.tensors, str(self.directory))
        if self.cfg.tied and HEAD in self.reader.tensors:
            self._check_tied()
        if self._target is None:
            self._check_uniform()

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype in which a leaf is given."""
        stored = self._spec(leaf.sources[0]).dtype
        return self._target if self._target is not None and is_floating(stored) and leaf.castable else stored

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf, copied out of the files; nothing else is read."""
        ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
        array = np.empty([len(each) for each in ranges], self.dtype(leaf))
        sources = np.empty(leaf.shape[: leaf.stack], object)
        sources[...] = np.array(leaf.sources, object).reshape(sources.shape)
        for to in np.ndindex(array.shape[: leaf.stack]):
            source = sources[tuple(each[i] for each, i in zip(ranges, to, strict=False))]
            self._fill(array[(*to, ...)], source, leaf.own_shape, index[leaf.stack :])
        return array

    def _fill(self, target: np.ndarray, source: Source, shape: tuple[int, ...], index: Index) -> None:
        name = self._names[source.name]
        rows = slice(*index[source.axis].indices(shape[source.axis])[:2])
        part = source.within(rows)[-1]
        self.reader.fill(target, name, (*index[: source.axis], part, *index[source.axis + 1 :]), source.transposed)
        self.reader.release(name)

    def _spec(self, source: Source) -> TensorSpec:
        return self.reader.tensors[self._names[source.name]]

    def _check_tied(self) -> None:
        """A stored head must be the embedding that the config says it is."""
        embedding = self._names[leaves(self.cfg)[0].sources[0].name]
        head, table = self.reader.view(HEAD), self.reader.view(embedding)
        same = head.dtype == table.dtype and head.shape == table.shape
        for first in range(0, len(head), 4096) if same else ():
            rows = slice(first, first + 4096)
            same = same and np.array_equal(head[rows].view(np.uint8), table[rows].view(np.uint8))
        self.reader.release(HEAD)
        self.reader.release(embedding)
        if not same:
            raise ValueError(
                f'{self.directory}: config.json says tie_word_embeddings, but {HEAD} differs from {embedding}: '
                'one of the two is wrong'
            )

    def _check_uniform(self) -> None:
        lines = []
        for leaf in leaves(self.cfg):
            dtypes = {source.name: self._spec(source).dtype for source in leaf.sources}
            if len(set(dtypes.values())) > 1:
                lines += [f'{name}: {dtype}' for name, dtype in dtypes.items()]
        if lines:
            raise ValueError(
                f'{self.directory}: layers of one kind are stored in different dtypes and cannot be stacked as they '
                f'are; ask for a dtype:\n  {listing(lines)}'
            )


def resolve_names(cfg: ModelConfig, found: Mapping[str, TensorSpec], place: str) -> dict[str, str]:
    """Maps the name of every tensor of the model to the name that the files use, which may lack the model's prefix.

    Raises:
        ValueError: names every missing, wrongly shaped and unexpected tensor.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for leaf in leaves(cfg):
        for source in leaf.sources:
            wanted[source.name] = source.stored_shape(leaf.own_shape)
    prefix = leaves(cfg)[0].sources[0].name.split('.')[0] + '.'
    bare = not any(name.startswith(prefix) for name in found)  # saved from the model without its head, as GPT-2 was
    names = {name: name.removeprefix(prefix) if bare else name for name in wanted}
    lines = []
    for name, shape in wanted.items():
        if names[name] not in found:
            lines.append(f'{name}: missing, expected {list(shape)}')
        elif found[names[name]].shape != shape:
            lines.append(f'{name}: has shape {list(found[names[name]].shape)}, expected {list(shape)}')
    known = set(names.values()) | ({HEAD} if cfg.tied else set())
    extra = [name for name in found if name not in known and not RECOMPUTED.fullmatch(name)]
    lines += [f'{name}: unexpected, {found[name].dtype}{list(found[name].shape)}' for name in extra]
    if lines:
        hint = '; it looks quantized, which is not read' if any('scale' in name for name in extra) else ''
        raise ValueError(
            f'{place}: not the tensors of the {cfg.family} model in config.json{hint}:\n  {listing(lines)}'
        )
    return names


def load_hf(
    path: str | os.PathLike[str], dtype: DTypeLike | None = None, shardings: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a Hugging Face directory: (cfg, params), params as jax arrays.

    Args:
        path: the directory.
        dtype: cast floating-point weights; None keeps every tensor's stored dtype.
        shardings: a tree like params of jax shardings; each process then reads only what its devices hold.

    Raises:
        FileNotFoundError, ValueError: as `HuggingFaceSource` and `load_tree`.
    """
    source = HuggingFaceSource(path, dtype)
    return source.cfg, load_tree(source, shardings)


def iterate_hf(path: str | os.PathLike[str], dtype: DTypeLike | None = None) -> Iterator[tuple[TreePath, np.ndarray]]:
    """The same leaf by leaf: (tree path, numpy array), with one leaf in memory at a time."""
    source = HuggingFaceSource(path, dtype)
    for leaf in leaves(source.cfg):
        yield leaf.path, source.read(leaf, whole(leaf))
