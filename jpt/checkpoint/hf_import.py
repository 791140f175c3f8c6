"""Reading Hugging Face directories: config.json, *.safetensors in one or many files, tied weights, any stored dtype."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.typing import DTypeLike

from jpt.checkpoint.assets import CONFIG_FILE
from jpt.checkpoint.dtypes import cast_target, is_floating
from jpt.checkpoint.hf_names import LeftOut, copies, current_names, is_beyond, may_differ, resolve_names, without_parts
from jpt.checkpoint.hf_quantized import expected, layout_of, read_laid
from jpt.checkpoint.layouts.modelopt import QUANT_FILE
from jpt.checkpoint.mixed_layers import split_by_format
from jpt.checkpoint.mxfp4 import PackedReader
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.shards import INDEX_FILE, SINGLE_FILE, ShardedReader
from jpt.checkpoint.source import Index, leaves_of, load_tree, whole
from jpt.checkpoint.tree import listing
from jpt.models.cache import CACHE_SCALES
from jpt.models.config import ModelConfig
from jpt.models.families import FAMILIES, config_from_hf
from jpt.models.families.multimodal import OTHER_PARTS, TEXT_NAMES, text_part
from jpt.models.names import Leaf, Source, TreePath
from jpt.quant.packing import Packing

SCALES = tuple(f'.{name}' for name in CACHE_SCALES)


def is_hf_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a Hugging Face model: config.json with safetensors beside it."""
    directory = Path(path)
    weights = (SINGLE_FILE, INDEX_FILE)
    return (directory / CONFIG_FILE).is_file() and any((directory / name).is_file() for name in weights)


def read_config(directory: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """The content of config.json, or of another file.

    Raises:
        FileNotFoundError, ValueError: absent, or not a JSON object.
    """
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f'{directory} is not a Hugging Face model: it has no {name}')
    try:
        content = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected a JSON object, found {type(content).__name__}')
    return content


class HuggingFaceSource:
    """A Hugging Face directory as a source of leaves. Everything but the values is checked when it is opened.

    Of a model of several parts the text model is read; `left_out` has the number and bytes of the other tensors by
    their prefix, and a warning says so.

    Args:
        path: the directory.
        dtype: cast floating-point weights to this; None keeps what is stored, tensor by tensor. The layers of one leaf
            must then agree, since they are stacked. Matrices in MXFP4 (see mxfp4.py) count as bfloat16, which holds
            them exactly.
        mtp: read modules that predict further tokens; else their tensors are set aside, whatever they hold.
        ignore_kv_scales: keys and values are as computed, whatever is said of a cache; scales of one are set aside.

    Raises:
        FileNotFoundError: no config or no safetensors (pickled weights are refused by name).
        ValueError: a config that jpt does not compute; missing, unexpected or wrongly shaped tensors, by name; layers
            of one leaf in different dtypes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        *,
        mtp: bool = True,
        ignore_kv_scales: bool = False,
    ) -> None:
        self.directory = Path(path)
        self._target, self._ignore_kv_scales = cast_target(dtype), ignore_kv_scales
        try:
            config, of_many = text_part(read_config(self.directory))
            self.cfg = config_from_hf(_unquantized(config))
        except ValueError as error:
            raise ValueError(f'{self.directory}: {error}') from error
        # Besides the layouts that hf_quantized has, only MXFP4 has been let through, and only where a family has it.
        packed = _unquantized(config).get('quantization_config') is not None
        self.reader = (PackedReader if packed else ShardedReader)(self.directory)
        self._resolve(config, of_many, mtp)
        self._check_copies()
        if self._target is None:
            self._check_uniform()

    def _resolve(self, config: Mapping[str, Any], of_many: bool, mtp: bool) -> None:
        """Finds the tensors of the model, and completes the model by them."""
        place, family = str(self.directory), FAMILIES[self.cfg.family]
        specs = self.reader.tensors
        self.left_out: dict[str, LeftOut] = {}
        if of_many:
            specs, self.left_out = without_parts(specs, OTHER_PARTS)
            parts = [f'{prefix}* {each.tensors} tensors, {each.bytes} bytes' for prefix, each in self.left_out.items()]
            logging.warning('%s: read as its text model; left out: %s', place, '; '.join(parts) or 'nothing')
        stored = current_names(specs, (*(TEXT_NAMES if of_many else ()), *family.dialect.older), place)
        if not mtp:
            self.cfg = dataclasses.replace(self.cfg, mtp=())
            stored = {name: where for name, where in stored.items() if not is_beyond(self.cfg, name)}
        promised, self.cfg = len(self.cfg.mtp), family.completed(self.cfg, stored)
        if len(self.cfg.mtp) < promised:
            logging.warning(
                '%s: config.json names %d modules that predict further tokens, of which there is no tensor: read '
                'without them',
                place,
                promised,
            )
        found = {name: specs[where] for name, where in stored.items()}
        if self._ignore_kv_scales:
            found = {name: spec for name, spec in found.items() if not name.endswith(SCALES)}
        try:
            beside = read_config(self.directory, QUANT_FILE) if (self.directory / QUANT_FILE).is_file() else None
            self.cfg = split_by_format(self.cfg, config, beside, found)
            self.cfg, self._laid = read_laid(self.cfg, config, beside, found, self._ignore_kv_scales)
            self.quantized: Mapping[TreePath, Packing] = self._laid.packings
            wanted = expected(self.cfg, self._laid, found)
        except ValueError as error:
            raise ValueError(f'{place}: {error}') from error
        names = resolve_names(self.cfg, found, place, wanted)
        self._names = {name: stored[found] for name, found in names.items()}
        read = {copy: name for copy, name in copies(self.cfg).items() if copy not in may_differ(self.cfg)}
        twice = {stored[copy]: self._names[name] for copy, name in read.items() if copy in stored}
        self._copies = {copy: name for copy, name in twice.items() if copy != name}
        for _, name, values in self._laid.beside(self.cfg):
            has = self.reader.view(self._names[name])
            if not np.array_equal(has, values):
                raise ValueError(f'{place}: {name} says {has.tolist()}, expected {values.tolist()}')

        self._check_scales()

    def _check_scales(self) -> None:
        """Raises ValueError where a scale of keys or values is nothing to divide by."""
        for leaf in self._laid.leaves(self.cfg):
            for source in leaf.sources if leaf.cache_scale else ():
                name = self._laid.source(leaf, source).name
                scale = float(self.reader.view(self._names[name]).reshape(()))
                if not 0 < scale < math.inf:
                    raise ValueError(f'{self.directory}: {name} is {scale}: expected a positive number')

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype in which a leaf is given."""
        if leaf.part is not None or leaf.cache_scale:
            return self._laid.dtype(leaf)
        stored = self._spec(leaf.sources[0]).dtype
        return self._target if self._target is not None and is_floating(stored) and leaf.castable else stored

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf, copied out of the files; nothing else is read."""
        ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
        if leaf.cache_scale and not self._laid.cache:
            return np.ones([len(each) for each in ranges], self.dtype(leaf))
        array = np.empty([len(each) for each in ranges], self.dtype(leaf))
        sources = np.empty(leaf.shape[: leaf.stack], object)
        sources[...] = np.array(leaf.sources, object).reshape(sources.shape)
        for to in np.ndindex(array.shape[: leaf.stack]):
            source = sources[tuple(each[i] for each, i in zip(ranges, to, strict=False))]
            self._fill(array[(*to, ...)], leaf, source, index[leaf.stack :])
        return array

    def _fill(self, target: np.ndarray, leaf: Leaf, weight: Source, index: Index) -> None:
        source, stored = self._laid.source(leaf, weight), self._laid.stored(leaf)
        name, shape = self._names[source.name], leaf.own_shape
        if stored is None:
            rows = slice(*index[source.axis].indices(shape[source.axis])[:2])
            part = source.within(rows)[-1]
            self.reader.fill(target, name, (*index[: source.axis], part, *index[source.axis + 1 :]), source.transposed)
        else:
            target[...] = stored.read(self.reader.view(name), shape, index, target.dtype)
        self.reader.release(name)

    def _spec(self, source: Source) -> TensorSpec:
        return self.reader.tensors[self._names[source.name]]

    def _check_copies(self) -> None:
        """What is stored twice, such as a head that the config says is the embedding, must be the same."""
        for copy, name in self._copies.items():
            one, other = self.reader.view(copy), self.reader.view(name)
            same = one.dtype == other.dtype and one.shape == other.shape
            for first in range(0, len(one), 4096) if same else ():
                rows = slice(first, first + 4096)
                same = same and np.array_equal(one[rows].view(np.uint8), other[rows].view(np.uint8))
            self.reader.release(copy)
            self.reader.release(name)
            if not same:
                raise ValueError(
                    f'{self.directory}: {copy} differs from {name}, of which it should be a copy '
                    f'(tie_word_embeddings={self.cfg.tied}): one of the two is wrong'
                )

    def _check_uniform(self) -> None:
        lines = []
        for leaf in leaves_of(self):
            if leaf.part is not None or leaf.cache_scale:  # exact in the dtype that it has in memory
                continue
            dtypes = {source.name: self._spec(source).dtype for source in leaf.sources}
            if len(set(dtypes.values())) > 1:
                lines += [f'{name}: {dtype}' for name, dtype in dtypes.items()]
        if lines:
            raise ValueError(
                f'{self.directory}: layers of one kind are stored in different dtypes and cannot be stacked as they '
                f'are; ask for a dtype:\n  {listing(lines)}'
            )


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model without what is said of weights in one of the layouts."""
    known = layout_of(config, None) is not None
    return {name: value for name, value in config.items() if not (known and name == 'quantization_config')}


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
    for leaf in leaves_of(source):
        yield leaf.path, source.read(leaf, whole(leaf))
