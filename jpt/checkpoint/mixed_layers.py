"""Hugging Face directories whose layers of one kind are quantized in several formats: read in more segments."""

from collections.abc import Mapping
from typing import Any

from jpt.checkpoint.hf_quantized import layout_of
from jpt.checkpoint.layouts.stored import WEIGHT, Scheme
from jpt.checkpoint.safetensors import TensorSpec
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf, Source, leaves
from jpt.models.splitting import split


def split_by_format(
    cfg: ModelConfig, config: Mapping[str, Any], beside: Mapping[str, Any] | None, tensors: Mapping[str, TensorSpec]
) -> ModelConfig:
    """The model with layers in segments of their own where others of their kind are quantized otherwise, or not at all.

    Arguments as `hf_quantized.read_laid`, which finds what does not fit.

    Raises:
        ValueError: a config that says what jpt does not read, or a module that it names has no scale.
    """
    layout = layout_of(config, beside)
    if layout is None:
        return cfg
    said = layout.said(config.get('quantization_config') or {}, beside)

    def scheme(source: Source) -> Scheme | None:
        found = said.scheme_of(source.name.removesuffix(f'.{WEIGHT}'), tensors)
        if found is None or found.of('scale').name(source.name) in tensors:
            return found
        if source.name.removesuffix(f'.{WEIGHT}') in said.named:
            raise ValueError(f'{source.name}: named as quantized, without {found.of("scale").name(source.name)}')
        return None

    marks: list[dict[str, tuple[Scheme | None, ...]]] = [{} for _ in range(cfg.num_layers)]
    for leaf in leaves(cfg):
        if leaf.path[0] == 'layers' and leaf.path[-1] == 'kernel':
            for number, schemes in _by_layer(cfg, leaf, scheme).items():
                marks[number]['/'.join(map(str, leaf.path[3:]))] = tuple(schemes)
    return split(cfg, [tuple(sorted(mark.items(), key=lambda item: item[0])) for mark in marks])


def _by_layer(cfg: ModelConfig, leaf: Leaf, scheme: Any) -> dict[int, dict[Scheme | None, None]]:
    """The schemes of a leaf's tensors by the number of their layer, each once."""
    found: dict[int, dict[Scheme | None, None]] = {}
    for place, source in leaf.places():
        number = cfg.layer_index(int(leaf.path[1]), int(leaf.path[2]), place[0])
        found.setdefault(number, {})[scheme(source)] = None
    return found
