"""Quantized weights in Hugging Face directories, in the layout of transformers' FineGrainedFP8 (DeepSeek-V3's own).

A linear layer X has X.weight in E4M3 [out, in] and X.weight_scale_inv [ceil(out / rows), ceil(in / columns)], which is
a multiplier in spite of its name: float32, or E8M0 where `scale_fmt` is 'ue8m0'. config.json says so in
`quantization_config`. transformers 5.23 (utils/quantization_config.py, integrations/finegrained_fp8.py) and DeepSeek-V3
(inference/fp8_cast_bf16.py) are the sources; vLLM and SGLang read the same, which was read, not run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jpt.checkpoint.dtypes import SAFETENSORS_DTYPES
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.source import LeafSource
from jpt.checkpoint.tree import listing, name_of
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf, Source, TreePath, leaves
from jpt.quant.formats import Format, Scale
from jpt.quant.packing import Packing

METHOD = 'fp8'
E4M3 = SAFETENSORS_DTYPES['F8_E4M3']
WEIGHT, SCALE = 'weight', 'weight_scale_inv'
_FIELDS = {'quant_method', 'fmt', 'weight_block_size', 'activation_scheme', 'scale_fmt', 'dequantize'}
_NAMES = {'modules_to_not_convert', 'modules_to_convert', 'ignored_layers'}  # the tensors say which these are


def quantized_of(
    cfg: ModelConfig, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> dict[TreePath, Packing]:
    """The weights of a model that are quantized, from its config.json and the tensors by their names of today.

    Raises:
        ValueError: a config that says what jpt does not read, a scale in a dtype that it does not go with, or layers of
            one kind of which only some are quantized.
    """
    given = config.get('quantization_config')
    if not isinstance(given, Mapping) or given.get('quant_method') != METHOD:
        return {}
    rows, columns = _block(given)
    dtype = str(config.get('dtype') or config.get('torch_dtype') or 'bfloat16')
    found: dict[TreePath, Packing] = {}
    mixed: list[str] = []
    for leaf in leaves(cfg):
        scaled = [scale_name(source.name) in tensors for source in leaf.sources]
        bare = [source.name for source, has in zip(leaf.sources, scaled, strict=True) if not has]
        if bare and (any(scaled) or any(name in tensors and tensors[name].dtype == E4M3 for name in bare)):
            mixed += [f'{name}: has no scale' for name in bare]
        if leaf.path[-1] != 'kernel' or not all(scaled):
            continue
        kinds = {tensors[scale_name(source.name)].dtype for source in leaf.sources}
        found[leaf.path] = Packing(Format('e4m3', rows, columns, _scale(kinds, given, leaf), 'block'), dtype)
    if mixed:
        raise ValueError(f'quantized in part; all layers of one kind must be:\n  {listing(mixed)}')
    if not found:
        raise ValueError(f"config.json: quantization_config.quant_method='{METHOD}', but there is no {SCALE}")
    return found


def _block(given: Mapping[str, Any]) -> tuple[int, int]:
    unknown = sorted(set(given) - _FIELDS - _NAMES - {'expert_dtype'})
    if unknown:
        raise ValueError(f'config.json: quantization_config has fields that jpt does not know: {", ".join(unknown)}')
    expected = {'fmt': ('e4m3', None), 'activation_scheme': ('dynamic',), 'expert_dtype': ('fp8', None)}
    for name, allowed in expected.items():
        if given.get(name, allowed[0]) not in allowed:
            raise ValueError(f'config.json: quantization_config.{name}={given[name]!r}: expected {allowed[0]!r}')
    block = given.get('weight_block_size', (128, 128))
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f'config.json: quantization_config.weight_block_size={block!r}: expected two numbers above 0')
    return block[0], block[1]


def _scale(kinds: set[np.dtype], given: Mapping[str, Any], leaf: Leaf) -> Scale:
    """How the scales of a leaf are stored."""
    powers = given.get('scale_fmt') == 'ue8m0'
    names = {str(kind) for kind in kinds}
    if names == {'float32'}:
        return 'power_of_two' if powers else 'float32'
    if names == {'float8_e8m0fnu'} and powers:
        return 'e8m0'
    shown = ', '.join(sorted(names))
    raise ValueError(
        f'{name_of(leaf.path)}: scales of {shown} with scale_fmt={given.get("scale_fmt", "float")!r}: '
        "expected float32, or float8_e8m0fnu with 'ue8m0'"
    )


def scale_name(weight: str) -> str:
    """The name of the scales beside a weight."""
    return f'{weight.removesuffix(WEIGHT)}{SCALE}'


def part_source(leaf: Leaf, source: Source) -> Source:
    """Where a part of a quantized weight lies, from where the weight would lie.

    Raises:
        ValueError: the weight shares its tensor with others, or lies there the other way round.
    """
    part = leaf.part
    if part is None:
        return source
    rows = leaf.own_shape[source.axis]
    if not source.alone or source.first or (part == 'codes' and source.total != rows):
        raise ValueError(f'{source.name}: a tensor of several weights, or a transposed one, cannot be quantized')
    return source if part == 'codes' else dataclasses.replace(source, name=scale_name(source.name), total=rows)


def quantization_config(source: LeafSource) -> dict[str, Any]:
    """What config.json says of quantized weights.

    Raises:
        ValueError: a format that this layout does not have, or several of them.
    """
    forms = {packing.form for packing in source.quantized.values()}
    for packing in source.quantized.values():
        form = packing.form
        if form.element != 'e4m3' or not form.rows or not form.columns or form.inputs != 'block':
            raise ValueError(f'{form}: a Hugging Face directory holds blocks of E4M3 whose inputs are rounded alike')
    if len(forms) > 1:
        raise ValueError(f'{len(forms)} formats: a Hugging Face directory holds blocks of one size')
    form = forms.pop()
    kept = [
        each.name.removesuffix(f'.{WEIGHT}')
        for leaf in leaves(source.cfg)
        if leaf.role == 'kernel' and leaf.path not in source.quantized
        for each in leaf.sources
    ]
    heads = ['lm_head'] if source.cfg.tied else []
    return {
        'quant_method': METHOD,
        'fmt': 'e4m3',
        'activation_scheme': 'dynamic',
        'weight_block_size': [form.rows, form.columns],
        'scale_fmt': 'float' if form.scale == 'float32' else 'ue8m0',
        'modules_to_not_convert': sorted({*kept, *heads}),
    }
