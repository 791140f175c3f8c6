"""Quantized weights in Hugging Face directories: which weights are quantized, in which of the layouts there are.

Each module of jpt/checkpoint/layouts is a layout: what its configs say, and which tensor every part of a quantized
weight is. What a config leaves out is not asked: the tensors tell which weights are quantized, and whatever does not
fit them is an error. transformers' 'fp8' holds blocks of E4M3, 'modelopt' and 'compressed-tensors' what their modules
say.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from jpt.checkpoint.dtypes import is_floating
from jpt.checkpoint.layouts.compressed import CompressedTensors
from jpt.checkpoint.layouts.fp8 import Fp8
from jpt.checkpoint.layouts.modelopt import ModelOpt
from jpt.checkpoint.layouts.stored import WEIGHT, Kept, Layout, Matrix, Said, Scheme, Shape, Stored, Written
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.source import LeafSource, packed_leaves, row_blocks, whole
from jpt.checkpoint.tree import listing, name_of
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf, Source, TreePath, leaves
from jpt.quant.packing import Packing

# In the order in which an export tries them; formats of OCP Microscaling, which are no transformers' fp8, begin with
# the second.
LAYOUTS: dict[str, Layout] = {each.method: each for each in (Fp8(), ModelOpt(), CompressedTensors())}
TOGETHER = (('q', 'k', 'v'), ('gate', 'up'))  # what servers hold as one matrix
WITHOUT = 'the model is read without by ignore_kv_scales=True, --ignore_kv_scales'
SHARED = 'a tensor of several weights, or a transposed one, cannot be quantized'


@dataclasses.dataclass(frozen=True)
class Laid:
    """How the quantized weights of a model lie in files.

    packings, schemes: of the weights by path.
    narrow: the parts that are written in a dtype other than their tensor's own, by path.
    cache: the tensors of the scales of keys and values, by their names; empty where there are none: such scales are 1.
    """

    packings: Mapping[TreePath, Packing] = dataclasses.field(default_factory=dict)
    schemes: Mapping[TreePath, Scheme] = dataclasses.field(default_factory=dict)
    narrow: Mapping[TreePath, np.dtype] = dataclasses.field(default_factory=dict)
    cache: Mapping[str, Stored] = dataclasses.field(default_factory=dict)

    def leaves(self, cfg: ModelConfig) -> tuple[Leaf, ...]:
        """The leaves of a model that lie in files."""
        return tuple(leaf for leaf in packed_leaves(cfg, self.packings) if self.cache or not leaf.cache_scale)

    def stored(self, leaf: Leaf) -> Stored | None:
        """The tensor that a leaf is as a part of a quantized weight, or a scale of a cache; None: it is neither."""
        if leaf.cache_scale:
            return self.cache[str(leaf.path[-1])]
        return None if leaf.part is None else self.schemes[leaf.path[:-1]].of(leaf.part)

    def source(self, leaf: Leaf, source: Source) -> Source:
        """Where a leaf lies, or a part of a quantized weight, from where the weight would lie.

        Raises:
            ValueError: a quantized weight that shares its tensor with others, or lies there the other way round.
        """
        stored = self.stored(leaf)
        if stored is None:
            return source
        codes = leaf.part == 'codes'
        if not leaf.cache_scale and (not source.alone or source.first or (codes and source.total != leaf.own_shape[0])):
            raise ValueError(f'{source.name}: {SHARED}')
        return dataclasses.replace(source, name=stored.name(source.name), copies=())

    def shapes(self, leaf: Leaf, source: Source) -> tuple[Shape, ...]:
        """The shapes that the tensor of one source of a leaf may have; the first is written."""
        stored = self.stored(leaf)
        return (source.stored_shape(leaf.own_shape),) if stored is None else stored.order.shapes(leaf.own_shape)

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype of a part, or of a scale of a cache, in memory."""
        if leaf.cache_scale:
            return np.dtype(np.float32)
        packing = self.packings[leaf.path[:-1]]
        return packing.parts((*leaf.shape[: leaf.stack], 2, 2))[str(leaf.part)].dtype

    def beside(self, cfg: ModelConfig) -> Iterator[tuple[str, str, np.ndarray]]:
        """Tensors that are no part: the name of the codes that each belongs to, its own name, and its values."""
        for leaf in leaves(cfg):
            scheme = self.schemes.get(leaf.path)
            if scheme is not None and scheme.beside is not None:
                shape = np.array(leaf.own_shape, np.int64)
                for source in leaf.sources:
                    yield scheme.of('codes').name(source.name), _beside(source.name, scheme.beside), shape


NOT_LAID = Laid()


def _beside(weight: str, suffix: str) -> str:
    return f'{weight.removesuffix(WEIGHT)}{suffix}'


def layout_of(config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Layout | None:
    """The layout of a directory, from its config.json and hf_quant_config.json; None: none of those here."""
    given = config.get('quantization_config')
    if given is None and beside is not None:
        return LAYOUTS['modelopt']
    return LAYOUTS.get(str(given.get('quant_method'))) if isinstance(given, Mapping) else None


def read_laid(
    cfg: ModelConfig,
    config: Mapping[str, Any],
    beside: Mapping[str, Any] | None,
    tensors: Mapping[str, TensorSpec],
    ignore_kv_scales: bool,
) -> tuple[ModelConfig, Laid]:
    """The model with its cache, and how its quantized weights lie: from its configs and the tensors by their names of
    today.

    Args:
        cfg: the model.
        config, beside: config.json, and hf_quant_config.json or None.
        tensors: their specs.
        ignore_kv_scales: keys and values are as computed, whatever is said.

    Raises:
        ValueError: a config that says what jpt does not read, a tensor in a dtype that does not go with it, or layers
            of one kind of which only some are quantized, or in different formats.
    """
    layout = layout_of(config, beside)
    if layout is None:
        return cfg, NOT_LAID
    said = layout.said(config.get('quantization_config') or {}, beside)
    cache: Mapping[str, Stored] = {}
    if said.cache and not ignore_kv_scales:
        if said.cache_fault is not None:
            raise ValueError(f'{said.cache_fault}; {WITHOUT}')
        cfg = dataclasses.replace(cfg, kv_cache='fp8')
        cache = _cache_tensors(cfg, layout, tensors)
    dtype = str(config.get('dtype') or config.get('torch_dtype') or 'bfloat16')
    packings: dict[TreePath, Packing] = {}
    schemes: dict[TreePath, Scheme] = {}
    faults: list[str] = []
    for leaf in leaves(cfg):
        scheme = _scheme_of(leaf, said, tensors, faults)
        if scheme is not None:
            schemes[leaf.path] = scheme
            packings[leaf.path] = _packing(leaf, scheme, tensors, dtype)
    if faults:
        raise ValueError(f'quantized in part; all experts of a layer must be, and alike:\n  {listing(faults)}')
    if not schemes and not said.cache:
        scale = 'weight_scale_inv' if layout.method == 'fp8' else 'weight_scale'
        raise ValueError(f"config.json: quantization_config.quant_method='{layout.method}', but there is no {scale}")
    return cfg, Laid(packings, schemes, cache=cache)


def _cache_tensors(cfg: ModelConfig, layout: Layout, tensors: Mapping[str, TensorSpec]) -> Mapping[str, Stored]:
    """The tensors of the scales of keys and values, where there are any."""
    lies = layout.cache
    assert lies is not None
    values = [name for name in tensors if name.endswith('.v_scale')]
    if cfg.latent is not None and values:
        raise ValueError(
            f'scales of keys and of values that are made from latents, of which a cache keeps neither; {WITHOUT}:\n  '
            f'{listing(values)}'
        )
    found = False
    for leaf in leaves(cfg):
        for source in leaf.sources if leaf.cache_scale else ():
            stored = lies.tensors[str(leaf.path[-1])]
            name = stored.name(source.name)
            found = found or name in tensors
            if name in tensors and not stored.allows(tensors[name].dtype):
                raise ValueError(f'{name}: is {tensors[name].dtype}, expected one of {", ".join(stored.dtypes)}')
    return lies.tensors if found or not lies.implied else {}


def _scheme_of(leaf: Leaf, said: Said, tensors: Mapping[str, TensorSpec], faults: list[str]) -> Scheme | None:
    """How a leaf lies if it is quantized; what does not fit goes to `faults`."""
    found: dict[str, Scheme | None] = {}
    for source in leaf.sources:
        module = source.name.removesuffix(f'.{WEIGHT}')
        scheme = said.scheme_of(module, tensors) if source.name != module and leaf.path[-1] == 'kernel' else None
        has = scheme is not None and scheme.of('scale').name(source.name) in tensors
        found[source.name] = scheme if has else None
        if not has and _looks_quantized(source.name, scheme, tensors):
            faults.append(f'{source.name}: has no scale' if scheme else f'{source.name}: no format is given')
    kinds = list(dict.fromkeys(found.values()))
    if len(kinds) == 1:
        return kinds[0]
    faults += [f'{name}: {"has no scale" if scheme is None else scheme.label}' for name, scheme in found.items()]
    return None


def _looks_quantized(weight: str, scheme: Scheme | None, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a weight without a scale is no weight as it was."""
    codes = None if scheme is None else scheme.of('codes').name(weight)
    if codes is not None and codes != weight and codes in tensors:
        return True
    dtype = tensors[weight].dtype if weight in tensors else None
    return dtype is not None and (not is_floating(dtype) or dtype.itemsize == 1)


def _packing(leaf: Leaf, scheme: Scheme, tensors: Mapping[str, TensorSpec], dtype: str) -> Packing:
    """How a weight is quantized, after the dtypes of its tensors are checked."""
    there = {}
    for stored in scheme.tensors:
        names = [stored.name(source.name) for source in leaf.sources]
        there[stored.part] = not stored.optional or any(name in tensors for name in names)
        for name in names:
            if name in tensors and not stored.allows(tensors[name].dtype):
                raise ValueError(f'{name}: is {tensors[name].dtype}, expected one of {", ".join(stored.dtypes)}')
    return Packing(scheme.form, dtype, there.get('input_scale', False), there.get('input_factor', False))


def expected(cfg: ModelConfig, laid: Laid, tensors: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    """The shapes of the model's tensors by name; of those that one may have, the one that it has.

    Raises:
        ValueError: as `Laid.source`, or a shape that a format does not take.
    """
    wanted: dict[str, Shape] = {}
    for leaf in laid.leaves(cfg):
        for each in leaf.sources:
            source = laid.source(leaf, each)
            shapes = laid.shapes(leaf, source)
            has = tensors[source.name].shape if source.name in tensors else None
            wanted[source.name] = has if has is not None and has in shapes else shapes[0]
    return wanted | {name: values.shape for _, name, values in laid.beside(cfg)}


def to_be_written(source: LeafSource, layout: str | None) -> tuple[Laid, Written | None]:
    """How the quantized weights of a model are to lie in files, and what the configs say.

    With several processes all of them call this: scales are read, to see whether a smaller dtype holds them.

    Args:
        source: the model.
        layout: one of LAYOUTS; None: the first that holds its formats.

    Raises:
        ValueError: no such layout, it does not hold them, or none does.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f'layout={layout!r}: expected one of {", ".join(LAYOUTS)}')
    if not source.quantized and source.cfg.kv_cache == 'as_computed':
        if layout is not None:
            raise ValueError(f'layout={layout!r}: the weights are not quantized')
        return NOT_LAID, None
    name, schemes, written = _held(source, layout)
    laid = Laid(source.quantized, schemes, cache=_cache_written(source, LAYOUTS[name]))
    apart = _apart(source)
    if apart:
        logging.warning(
            'matrices that vLLM multiplies as one have different second scales, of which it takes the largest for all: '
            'numbers of the others would be too large there. Quantize them with one scale_2:\n  %s',
            listing(apart),
        )
    return dataclasses.replace(laid, narrow=_narrow(source, laid)), written


def _cache_written(source: LeafSource, layout: Layout) -> Mapping[str, Stored]:
    """The tensors that are written for the scales of keys and values, if any."""
    scales = [source.read(leaf, whole(leaf)) for leaf in leaves(source.cfg) if leaf.cache_scale]
    lies = layout.cache
    if lies is None or not scales or (lies.implied and all(np.all(scale == 1) for scale in scales)):
        return {}
    return lies.tensors


class Described(NamedTuple):
    """What is known of a model before it is there."""

    cfg: ModelConfig
    quantized: Mapping[TreePath, Packing]


def check_held(model: Described) -> None:
    """Whether some layout can hold such a model.

    Raises:
        ValueError: none can.
    """
    _held(model, None)


def _held(source: LeafSource | Described, layout: str | None) -> tuple[str, dict[TreePath, Scheme], Written]:
    """The layout that is written, and how."""
    _check_alone(source)
    matrices = _matrices(source)
    done: dict[str, tuple[dict[TreePath, Scheme], Written]] = {}
    reasons: dict[str, str] = {}
    for name, each in LAYOUTS.items():
        try:
            done[name] = _chosen(source, each, matrices)
        except ValueError as error:
            reasons[name] = str(error)
    name = layout or _first(source, list(done))
    if name not in done:
        tried = reasons if layout is None else {layout: reasons[layout]}
        others = f'\nlayouts that hold it: {", ".join(done)}' if done else ''
        raise ValueError('\n'.join(f'layout {each!r}: {why}' for each, why in tried.items()) + others)
    return name, *done[name]


def _check_alone(source: LeafSource | Described) -> None:
    """Raises ValueError where a quantized weight shares its tensor with others, or lies there the other way round."""
    for leaf in leaves(source.cfg):
        for each in leaf.sources if leaf.path in source.quantized else ():
            if not each.alone or each.first or each.total != leaf.own_shape[0]:
                raise ValueError(f'{each.name}: {SHARED}')


def _first(source: LeafSource | Described, names: list[str]) -> str:
    """The layout that an export has where none is asked for."""
    mx = any(packing.form.is_mx for packing in source.quantized.values())
    order = sorted(names, key=lambda name: name == 'fp8') if mx else names
    if not source.quantized:  # a cache alone: vLLM refuses ModelOpt's config without a quant_algo
        order = names[::-1]
    return order[0] if order else ''


def _matrices(source: LeafSource | Described) -> list[Matrix]:
    found = []
    for leaf in leaves(source.cfg):
        packing = source.quantized.get(leaf.path)
        if packing is not None:
            modules = tuple(each.name.removesuffix(f'.{WEIGHT}') for each in leaf.sources)
            found.append(Matrix(leaf.path, leaf.own_shape, modules, packing))
    return found


def _chosen(
    source: LeafSource | Described, layout: Layout, matrices: list[Matrix]
) -> tuple[dict[TreePath, Scheme], Written]:
    """The schemes of a layout by path, and its configs."""
    chosen = []
    cache = source.cfg.kv_cache == 'fp8'
    if cache and layout.cache is None:
        raise ValueError('has no place for scales of keys and values')
    for matrix in matrices:
        try:
            chosen.append((matrix, layout.scheme(matrix)))
        except ValueError as error:
            raise ValueError(f'{name_of(matrix.path)}: {matrix.packing.form}: {error}') from error
    written = layout.written(chosen, _kept(source), cache)
    return {matrix.path: scheme for matrix, scheme in chosen}, written


def _kept(source: LeafSource | Described) -> Kept:
    names: dict[str, set[str]] = {'kernel': {'lm_head'} if source.cfg.tied else set(), 'embedding': set()}
    for leaf in leaves(source.cfg):
        if leaf.role in names and leaf.path not in source.quantized:
            names[leaf.role] |= {each.name.removesuffix(f'.{WEIGHT}') for each in leaf.sources}
    return Kept(tuple(sorted(names['kernel'])), tuple(sorted(names['embedding'])))


def _apart(source: LeafSource) -> list[str]:
    """Matrices side by side (q, k, v; gate, up) that do not share the second scale that they have."""
    found: dict[tuple[TreePath, tuple[str, ...]], dict[str, np.ndarray]] = {}
    for leaf in packed_leaves(source.cfg, source.quantized):
        if leaf.part == 'scale_2':
            *parent, name, _, _ = leaf.path
            group = next((group for group in TOGETHER if name in group), None)
            if group is not None:
                found.setdefault((tuple(parent), group), {})[str(name)] = source.read(leaf, whole(leaf))
    return [
        f'{name_of(parent)}: {", ".join(scales)}'
        for (parent, _), scales in found.items()
        if any(not np.array_equal(one, other) for one, other in itertools.pairwise(scales.values()))
    ]


def _narrow(source: LeafSource, laid: Laid) -> dict[TreePath, np.dtype]:
    """The parts that lie in the dtype of their weight, where that holds them exactly."""
    found = {}
    for leaf in laid.leaves(source.cfg):
        stored = laid.stored(leaf)
        if stored is None or not stored.narrow:
            continue
        dtype = _weight_dtype(source, leaf)
        for rows in (slice(0, 1), *row_blocks(leaf.shape, 4)):  # the first layer mostly tells
            values = source.read(leaf, (rows, *whole(leaf)[1:]))
            if not np.array_equal(values.astype(dtype).astype(np.float32), values):
                break
        else:
            found[leaf.path] = dtype
    return found


def _weight_dtype(source: LeafSource, leaf: Leaf) -> np.dtype:
    """The dtype of the weight that a leaf is a part of, or of the map that makes what a cache keeps."""
    if not leaf.cache_scale:
        return jnp.dtype(source.quantized[leaf.path[:-1]].weight_dtype)
    out = next(each for each in leaves(source.cfg) if each.path == (*leaf.path[:-1], 'out', 'kernel'))
    packing = source.quantized.get(out.path)
    return source.dtype(out) if packing is None else jnp.dtype(packing.weight_dtype)
