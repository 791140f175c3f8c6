"""Where a model's weights come from, leaf by leaf and part by part, and how they are put on devices.

Hugging Face directories, jpt checkpoints and trees in memory are all read through `LeafSource`, so that loading,
converting, exporting and resizing are written once and never need more memory than the part that they ask for.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from jpt.checkpoint.dtypes import cast, cast_target, is_floating
from jpt.checkpoint.tree import LeafSpec, differences, listing, name_of, named_leaves, specs_of
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf, TreePath, get, leaves, put
from jpt.quant.packing import Packing, packing_of
from jpt.quant.tensors import QTensor

Index = tuple[slice, ...]
NOT_QUANTIZED: Mapping[TreePath, Packing] = MappingProxyType({})
BLOCK_BYTES = 64 * 2**20


class LeafSource(Protocol):
    """A model whose weights can be read in parts."""

    @property
    def cfg(self) -> ModelConfig: ...

    @property
    def quantized(self) -> Mapping[TreePath, Packing]:
        """The weights that it holds as codes and scales; `leaves_of` has their parts in place of them."""

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype that `read` gives for a leaf."""

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf; `index` has a slice per axis of leaf.shape."""


def leaves_of(source: LeafSource) -> tuple[Leaf, ...]:
    """The leaves that a source has."""
    return packed_leaves(source.cfg, source.quantized)


def packed_leaves(cfg: ModelConfig, quantized: Mapping[TreePath, Packing]) -> tuple[Leaf, ...]:
    """The leaves of a model in which some weights are replaced by the parts that they are quantized as."""
    found: list[Leaf] = []
    for leaf in leaves(cfg):
        packing = quantized.get(leaf.path)
        if packing is None:
            found.append(leaf)
            continue
        for name, part in packing.parts(leaf.shape).items():
            found.append(dataclasses.replace(leaf, path=(*leaf.path, name), shape=part.shape))
    return tuple(found)


def whole_weights(source: LeafSource, what: str) -> LeafSource:
    """The source, where none of its weights is quantized.

    Raises:
        ValueError: some are. `what` says for what they are needed as they were.
    """
    if source.quantized:
        names = [name_of(path) for path in source.quantized]
        raise ValueError(f"{what}: the weights are quantized; ask for a dtype, such as 'bfloat16':\n  {listing(names)}")
    return source


class WithoutMTP:
    """A source without the modules that predict further tokens, where it has any."""

    def __init__(self, source: LeafSource) -> None:
        self.cfg = dataclasses.replace(source.cfg, mtp=())
        self.quantized = {path: packing for path, packing in source.quantized.items() if path[0] != 'mtp'}
        self._source = source

    def dtype(self, leaf: Leaf) -> np.dtype:
        """That of the whole model's leaf."""
        return self._source.dtype(leaf)

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf of the whole model."""
        return self._source.read(leaf, index)


class WithPlainCache:
    """A source whose keys and values are kept as they are computed, without the scales that it may have for them."""

    def __init__(self, source: LeafSource) -> None:
        self.cfg = dataclasses.replace(source.cfg, kv_cache='as_computed')
        self.quantized = source.quantized
        self._source = source

    def dtype(self, leaf: Leaf) -> np.dtype:
        """That of the source's leaf."""
        return self._source.dtype(leaf)

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf of the source."""
        return self._source.read(leaf, index)


class TreeSource:
    """A parameter tree in memory, numpy or jax, also where rows beyond the vocabulary pad it for a mesh.

    Raises:
        ValueError: the tree does not have the leaves of `cfg`; the message names them.
    """

    def __init__(self, cfg: ModelConfig, params: Any, dtype: DTypeLike | None = None) -> None:
        self.cfg, self._params, self._target = cfg, params, cast_target(dtype)
        found = specs_of(named_leaves(params))
        self.quantized = {
            leaf.path: packing_of(weight)
            for leaf in leaves(cfg)
            if isinstance(weight := _weight_at(params, leaf.path), QTensor)
        }
        wanted = {}
        for leaf in leaves_of(self):
            name = name_of(leaf.path)
            have = found.get(name, LeafSpec('', leaf.shape))
            padded = is_vocabulary(leaf) and have.shape[1:] == leaf.shape[1:] and have.shape[0] >= leaf.shape[0]
            wanted[name] = LeafSpec(have.dtype, have.shape if padded else leaf.shape)
        lines = [line.replace('in the checkpoint', 'in the tree') for line in differences(found, wanted)]
        if lines:
            raise ValueError(f'the parameters are not those of the {cfg.family} model config:\n  {listing(lines)}')
        self._held: tuple[TreePath, dict[TreePath, np.ndarray]] = ((), {})  # a weight, whole or in its parts

    def array(self, leaf: Leaf) -> Any:
        """The leaf as it lies in the tree, less the rows that pad it."""
        array = get(self._params, leaf.path)
        return array if array.shape == leaf.shape else array[: leaf.shape[0]]

    def dtype(self, leaf: Leaf) -> np.dtype:
        stored = np.dtype(self.array(leaf).dtype)
        return self._target if self._target is not None and is_floating(stored) and leaf.castable else stored

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        if self._held[0] != leaf.weight_path:
            self._held = (leaf.weight_path, {})
        held = self._held[1]
        if leaf.path not in held:
            held[leaf.path] = to_host(self.array(leaf))
        return cast(held[leaf.path][index], self._target if leaf.castable else None)


def _weight_at(params: Any, path: TreePath) -> Any:
    """What stands at a path, or None."""
    try:
        return get(params, path)
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def is_vocabulary(leaf: Leaf) -> bool:
    """Whether a leaf has a row per token of the vocabulary."""
    return leaf.path in (('embed', 'embedding'), ('lm_head', 'kernel'))


def to_host(array: Any) -> np.ndarray:
    """A whole array on the host; with several processes every one of them must call this, and gets it all."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def whole(leaf: Leaf) -> Index:
    """The index of all of a leaf."""
    return tuple(slice(0, size) for size in leaf.shape)


def row_blocks(shape: tuple[int, ...], itemsize: int, together: int = 1) -> Iterator[slice]:
    """Slices of the leading axis, each of about BLOCK_BYTES at most, or of as few rows as stay together."""
    row_bytes = itemsize * together * math.prod(shape[1:])
    rows = together * max(1, min(shape[0] // together, BLOCK_BYTES // max(row_bytes, 1)))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))


def merged(base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """base [..., out, in] + scale * b [..., out, rank] a [..., rank, in], in the dtype of the base.

    Computed in float32, or in float64 where the base is that.
    """
    wide = np.dtype(np.float64 if base.dtype == np.float64 else np.float32)
    return (base.astype(wide) + scale * (b.astype(wide) @ a.astype(wide))).astype(base.dtype)


def load_tree(source: LeafSource, shardings: Any = None) -> dict[str, Any]:
    """The parameter tree as jax arrays.

    Args:
        source: where the weights are.
        shardings: a tree like the parameters, of jax shardings: each process then reads the parts that its devices
            hold and nothing else. None puts everything on the default device.

    Raises:
        ValueError: a dtype that JAX would cast (64 bits without jax_enable_x64).
    """
    params: dict[str, Any] = {}
    for leaf in leaves_of(source):
        dtype = source.dtype(leaf)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f'{name_of(leaf.path)} is stored as {dtype}, which a jax.Array holds only with jax_enable_x64; '
                f"nothing is cast silently: set it, or ask for a dtype such as 'float32'"
            )
        if shardings is None:
            put(params, leaf.path, jax.device_put(source.read(leaf, whole(leaf))))
        else:
            put(params, leaf.path, _place(source, leaf, get(shardings, leaf.path)))
    return assembled(source, params)


def assembled(source: LeafSource, tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of the source's leaves, in which the parts of every quantized weight become one; changed in place."""
    for path, packing in source.quantized.items():
        put(tree, path, packing.assembled(get(tree, path)))
    return tree


def _place(source: LeafSource, leaf: Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        # Devices that hold the same part ask for it one by one.
        bounds = tuple(s.indices(size) for s, size in zip(index, leaf.shape, strict=True))
        if bounds not in parts:
            parts[bounds] = source.read(leaf, tuple(slice(*bound) for bound in bounds))
        return parts[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, part)
