"""Writing Hugging Face directories that transformers, vLLM and SGLang load: weights, config, tokenizer, model card."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jpt.checkpoint.about import model_differences
from jpt.checkpoint.assets import CARD_FILE, CONFIG_FILE, GENERATION_FILE, copy_assets, open_tokenizer
from jpt.checkpoint.card import model_card
from jpt.checkpoint.directories import check_absent, new_directory
from jpt.checkpoint.hf_import import read_config
from jpt.checkpoint.hf_quantized import NOT_LAID, Laid, to_be_written
from jpt.checkpoint.layouts.stored import Shape, Stored, Written
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.shards import ShardedWriter
from jpt.checkpoint.source import Index, LeafSource, TreeSource, row_blocks, whole
from jpt.checkpoint.tree import listing
from jpt.data.tokenizer import TOKENIZER_FILES
from jpt.models.config import ModelConfig
from jpt.models.families import config_from_hf, config_to_hf
from jpt.models.families.fields import ACTIVATION_NAMES, HARMLESS
from jpt.models.families.multimodal import text_part
from jpt.models.names import Leaf, Source
from jpt.models.splitting import joined

# Of the fields that leave the computation alone, these are about the weights or the file and are written anew.
_WRITTEN_ANEW = frozenset(['model_type', 'architectures', 'torch_dtype', 'dtype', '_name_or_path', 'name_or_path'])
_DROPOUT = frozenset(['resid_pdrop', 'embd_pdrop', 'attn_pdrop'])  # GPT-2's names; transformers' default is 0.1


@dataclasses.dataclass(frozen=True)
class _Part:
    """What of a leaf one source holds, as a part of a tensor; `place` is where it stands on the leading axes.

    `stored` says how it lies there as a part of a quantized weight; None: it is none.
    """

    leaf: Leaf
    place: tuple[int, ...]
    source: Source
    stored: Stored | None = None

    def index(self, rows: slice | None = None) -> Index:
        """Where in the leaf the part is; `rows` narrows it on its own first axis, where it has one."""
        own = whole(self.leaf)[len(self.place) :]
        rows = rows if own else None
        here = tuple(slice(at, at + 1) for at in self.place)
        return (*here, *(own if rows is None else (rows, *own[1:])))

    @property
    def shape(self) -> Shape:
        return self.leaf.own_shape

    @property
    def tensor_shape(self) -> Shape:
        """Of the whole tensor."""
        own = self.shape
        return self.source.stored_shape(own) if self.stored is None else self.stored.order.shapes(own)[0]


def tensors_of(cfg: ModelConfig, laid: Laid = NOT_LAID) -> dict[str, list[_Part]]:
    """The parts of every tensor of the model, by Hugging Face name, grouped by leaf.

    Codes and scales of one matrix follow each other: a source may make them together.
    """
    tensors: dict[str, list[_Part]] = {}
    for _, together in itertools.groupby(laid.leaves(cfg), lambda leaf: leaf.weight_path):
        for parts in zip(*([(leaf, *place) for place in leaf.places()] for leaf in together), strict=True):
            for leaf, place, weight in parts:
                source = laid.source(leaf, weight)
                for name in (source.name, *source.copies):
                    tensors.setdefault(name, []).append(_Part(leaf, place, source, laid.stored(leaf)))
    return {name: sorted(parts, key=lambda part: part.source.first) for name, parts in tensors.items()}


def _layer_order(cfg: ModelConfig, tensors: dict[str, list[_Part]]) -> list[str]:
    """Names in the order of the network, so that a shard holds neighbouring layers."""

    def layer(name: str) -> int:
        part = tensors[name][0]
        if part.leaf.path[0] == 'layers':
            return cfg.layer_index(int(part.leaf.path[1]), int(part.leaf.path[2]), part.place[0])
        return -1 if part.leaf.path[0] in ('embed', 'positions') else cfg.num_layers

    return sorted(tensors, key=layer)


def write_hf(
    source: LeafSource,
    path: str | os.PathLike[str],
    *,
    source_dir: str | os.PathLike[str] | None = None,
    origin: str | os.PathLike[str] | None = None,
    max_shard_size: str | int = '5GB',
    layout: str | None = None,
    report: Callable[[str, int], Any] = lambda name, size: None,
) -> list[Path]:
    """Writes a model as a Hugging Face directory, a part of a tensor in memory at a time; returns the weight files.

    Args:
        source: the model.
        path: the directory to make; it appears when it is complete. It must not exist, or be empty.
        source_dir: where tokenizer files, generation_config.json and remaining fields of config.json lie.
        origin: the directory of the model that the weights were read from, for its card; None: from none.
        max_shard_size: such as '5GB'.
        layout: of quantized weights: 'fp8', 'modelopt' or 'compressed-tensors'; None: the first that holds them.
        report: called with the name and the bytes of what has been written.

    Raises:
        FileExistsError: there is something at `path`.
        ValueError: a dtype that safetensors does not have, or a layout that does not hold the formats of the model.
    """
    laid, quantization = to_be_written(source, layout)
    tensors = tensors_of(source.cfg, laid)
    beside = {name: (codes, values) for codes, name, values in laid.beside(source.cfg)}
    specs = _specs(source, laid, tensors, beside)
    assets = None if source_dir is None else Path(source_dir)
    with new_directory(path) as directory:
        with ShardedWriter(directory, specs, max_shard_size) as writer:
            for name, parts in tensors.items():
                _write_tensor(writer, name, parts, source, specs[name].dtype)
                report(name, specs[name].nbytes)
            for name, (_, values) in beside.items():
                writer.write(name, values)
        written = str(specs[next(iter(specs))].dtype)
        _write_configs(directory, hf_config(source.cfg, written, assets), quantization)
        if assets is not None:
            copy_assets(assets, directory, (*TOKENIZER_FILES, GENERATION_FILE))
        card = model_card(source.cfg, written, None if origin is None else Path(origin))
        (directory / CARD_FILE).write_text(card, 'utf-8')
        files = list(writer.shards)
    return [Path(path) / file for file in files]


def _specs(
    source: LeafSource, laid: Laid, tensors: dict[str, list[_Part]], beside: Mapping[str, tuple[str, np.ndarray]]
) -> dict[str, TensorSpec]:
    """Every tensor's dtype and shape, in the order in which the files hold them."""
    following: dict[str, list[str]] = {}
    for name, (codes, _) in beside.items():
        following.setdefault(codes, []).append(name)
    specs = {}
    for name in _layer_order(source.cfg, tensors):
        first, *_ = parts = tensors[name]
        if first.stored is not None:
            dtypes = {laid.narrow.get(first.leaf.path, first.stored.dtype)}
        else:
            dtypes = {source.dtype(part.leaf) for part in parts}
        if len(dtypes) > 1:
            raise ValueError(f'{name}: its parts have different dtypes: {", ".join(sorted(map(str, dtypes)))}')
        specs[name] = TensorSpec(dtypes.pop(), first.tensor_shape)
        for other in following.get(name, ()):
            values = beside[other][1]
            specs[other] = TensorSpec(values.dtype, values.shape)
    return specs


def _write_tensor(writer: ShardedWriter, name: str, parts: list[_Part], source: LeafSource, dtype: np.dtype) -> None:
    """Writes one tensor; `dtype` is that of the file, which of a part of a quantized weight may be another."""
    first, stored = parts[0].source, parts[0].stored
    if stored is not None:
        _write_stored(writer, name, parts[0], stored, source, dtype)
        return
    if first.alone:
        for part in parts:
            for rows in row_blocks(part.shape, source.dtype(part.leaf).itemsize):
                block = _squeeze(part, source.read(part.leaf, part.index(rows)))
                writer.write(name, block, part.source.first + rows.start)
        return
    # Every part once and in order: with several processes the others gather as often (see export_hf).
    values = [_squeeze(part, source.read(part.leaf, part.index())) for part in parts]
    if first.axis == 0:
        writer.write(name, _joined(parts, values))
        return
    for expert in range(parts[0].shape[0]):
        writer.write(name, _joined(parts, [value[expert : expert + 1] for value in values]), expert)


def _write_stored(
    writer: ShardedWriter, name: str, part: _Part, stored: Stored, source: LeafSource, dtype: np.dtype
) -> None:
    """Writes the tensor that is a part of a quantized weight."""
    if not part.tensor_shape:
        writer.write(name, stored.write(_squeeze(part, source.read(part.leaf, part.index())), part.shape, dtype))
        return
    together = stored.order.rows
    if stored.part == 'codes':  # whole blocks, which a source may make from what it reads
        together = math.lcm(together, source.quantized[part.leaf.weight_path].form.rows or 1)
    for rows in row_blocks(part.shape or (1,), source.dtype(part.leaf).itemsize, together):
        block = _squeeze(part, source.read(part.leaf, part.index(rows if part.shape else None)))
        writer.write(name, stored.write(block, part.shape, dtype), rows.start // stored.order.rows)


def _joined(parts: list[_Part], values: list[np.ndarray]) -> np.ndarray:
    """The tensor that the parts lie in side by side, from what each of them holds."""
    source, shape = parts[0].source, values[0].shape
    untransposed = dataclasses.replace(source, transposed=False)
    tensor = np.empty(untransposed.stored_shape(shape), values[0].dtype)
    for part, value in zip(parts, values, strict=True):
        tensor[part.source.within(slice(0, value.shape[source.axis]))] = value
    return np.ascontiguousarray(tensor.swapaxes(-1, -2)) if source.transposed else tensor


def _squeeze(part: _Part, array: np.ndarray) -> np.ndarray:
    return array[(0,) * len(part.place)]


def export_hf(
    path: str | os.PathLike[str],
    cfg: ModelConfig,
    params: Any,
    *,
    source_dir: str | os.PathLike[str] | None = None,
    origin: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: str | int = '5GB',
    layout: str | None = None,
) -> None:
    """Writes parameters in memory as a Hugging Face directory; `dtype` None keeps the dtype of each leaf.

    With several processes all of them call this; process 0 writes. Rows that pad the vocabulary for a mesh are left
    out. Other arguments and errors as `write_hf`.
    """
    if jax.process_index() == 0:  # the others may look when it has begun to write
        check_absent(path)
    source = TreeSource(cfg, params, dtype)
    if jax.process_index() == 0:
        write_hf(source, path, source_dir=source_dir, origin=origin, max_shard_size=max_shard_size, layout=layout)
        return
    laid, _ = to_be_written(source, layout)
    for parts in tensors_of(cfg, laid).values():  # takes part in gathering the arrays, in the same order
        for part in parts:
            source.read(part.leaf, part.index(slice(0, 0)))


def hf_config(cfg: ModelConfig, dtype: str, source_dir: Path | None = None) -> dict[str, Any]:
    """config.json: what the model computes, and the harmless fields (special token ids and the like) of its source.

    A model without such a source has the ids of its tokenizer; left out, they would be numbers of transformers' own.

    Raises:
        ValueError: the family has no config.json that says all of what the model computes.
    """
    written = config_to_hf(cfg, dtype)
    if source_dir is not None and (source_dir / CONFIG_FILE).is_file():
        content = text_part(read_config(source_dir)).config
        carried = {key: value for key, value in content.items() if key in (HARMLESS | _DROPOUT) - _WRITTEN_ANEW}
        written |= _spelled_alike(written, content)
    else:
        tokenizer = open_tokenizer(source_dir)
        carried = {f'{name}_token_id': getattr(tokenizer, f'{name}_id', None) for name in ('bos', 'eos', 'pad')}
    described = dataclasses.replace(joined(cfg), kv_cache='as_computed')  # the cache is said by quantization_config
    lines = model_differences(config_from_hf(json.loads(json.dumps(written))), described)
    if lines:
        lines = [line.replace('in the checkpoint', 'as config.json would say it') for line in lines]
        raise ValueError(f'a config.json of {cfg.family} cannot say what the model computes:\n  {listing(lines)}')
    return carried | written


def _spelled_alike(written: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The source's names of an activation that has several: transformers computes each in its own way."""
    found: dict[str, Any] = {}
    for name in ('hidden_act', 'hidden_activation', 'activation_function'):
        if name in written and ACTIVATION_NAMES.get(source.get(name, '')) == ACTIVATION_NAMES[written[name]]:
            found[name] = source[name]
    return found


def _write_configs(directory: Path, config: Mapping[str, Any], quantization: Written | None) -> None:
    """config.json, and what says more of quantized weights."""
    files = {CONFIG_FILE: config}
    if quantization is not None:
        files = {CONFIG_FILE: {**config, 'quantization_config': quantization.config}, **quantization.files}
    for name, content in files.items():
        _write_json(directory / name, content)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', 'utf-8')
