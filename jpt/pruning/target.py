"""From a model to the sizes that were asked for: depth, MLP channels, heads, hidden dimensions, one after the other."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpt.checkpoint.scaled import ScaledNorms
from jpt.checkpoint.selected import SelectedLayers
from jpt.checkpoint.sliced import Ids, Kept, SlicedSource, check_sliced
from jpt.checkpoint.source import LeafSource
from jpt.models.config import ModelConfig
from jpt.pruning.importance import Importance, most, most_heads, of_layers

# Families whose config transformers refuses where the heads do not divide the width, even with a head_dim of its own.
DIVIDED = ('llama', 'gemma2', 'gemma3_text')


@dataclasses.dataclass(frozen=True)
class Target:
    """The sizes of a smaller model, under the names of config.json; None: as it is.

    `layers` names the layers that stay. Without it, `num_hidden_layers` says how many.
    """

    num_hidden_layers: int | None = None
    layers: Ids | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    hidden_size: int | None = None

    @property
    def narrows(self) -> bool:
        """Whether anything but depth is asked for."""
        return any(getattr(self, name) is not None for name in _NARROW)


_NARROW = ('intermediate_size', 'num_attention_heads', 'num_key_value_heads', 'hidden_size')


class Step(NamedTuple):
    """A model on the way to the target: what was just left out, which layers and parts of them are still there."""

    name: str
    source: LeafSource
    layers: Ids
    kept: Kept


def check_target(cfg: ModelConfig, target: Target) -> None:
    """Raises ValueError where a target is none, or not smaller than the model, or no model of its family."""
    if target == Target():
        raise ValueError('nothing to prune: expected a smaller size, such as --intermediate_size')
    if target.layers is not None and target.num_hidden_layers is not None:
        raise ValueError(
            f'--layers and --num_hidden_layers={target.num_hidden_layers}: expected which layers, or how many'
        )
    if target.narrows:
        check_sliced(cfg)
    whole = _sizes(cfg)
    for name, size in whole.items():
        asked = getattr(target, name)
        if asked is not None and not 1 <= asked <= size:
            raise ValueError(f"--{name}={asked}: expected 1 to {size}, the model's own")
    if target.hidden_size is not None and cfg.embed_scale is not None:
        raise ValueError(
            f'--hidden_size={target.hidden_size}: {cfg.family} multiplies embeddings by the root of the hidden size, '
            'a factor that would change: expected other sizes only'
        )
    heads, groups = _heads(cfg, target)
    if heads % groups or heads // groups > cfg.num_heads // cfg.num_kv_heads:
        raise ValueError(
            f'--num_attention_heads={heads} with num_key_value_heads={groups}: expected a multiple of {groups}, '
            f'{cfg.num_heads // cfg.num_kv_heads} times as many at most'
        )
    width = target.hidden_size or cfg.width
    if cfg.family in DIVIDED and target.narrows and width % heads:
        raise ValueError(
            f'hidden_size={width} with num_attention_heads={heads}: transformers opens a {cfg.family} only where the '
            'heads divide the width: expected such sizes'
        )


def _sizes(cfg: ModelConfig) -> dict[str, int]:
    return {
        'num_hidden_layers': cfg.num_layers,
        'intermediate_size': max(kind.mlp_width for kind in cfg.layer_kinds()),
        'num_attention_heads': cfg.num_heads,
        'num_key_value_heads': cfg.num_kv_heads,
        'hidden_size': cfg.width,
    }


def _heads(cfg: ModelConfig, target: Target) -> tuple[int, int]:
    """(query heads, kv heads) that are asked for.

    Where only kv heads are, they keep all of their query heads; where only query heads are, all kv heads stay, or
    as many as there are query heads if each has its own.
    """
    per_group = cfg.num_heads // cfg.num_kv_heads
    own = target.num_attention_heads if per_group == 1 else None
    groups = target.num_key_value_heads or own or cfg.num_kv_heads
    return target.num_attention_heads or per_group * groups, groups


def steps(source: LeafSource, scores: Importance, target: Target) -> Iterator[Step]:
    """The models on the way: without layers, then without MLP channels, heads, and hidden dimensions.

    All scores are of the whole model (pruning again and again with new ones was no better in Minitron, section 4).

    Raises:
        ValueError: see `check_target`, `SelectedLayers` and `SlicedSource`.
    """
    cfg = source.cfg
    check_target(cfg, target)
    layers: Ids = tuple(range(cfg.num_layers))
    if target.layers is not None or target.num_hidden_layers is not None:
        layers = target.layers or most(scores.layers_L, target.num_hidden_layers or cfg.num_layers)
        source = SelectedLayers(source, layers)
        scores = of_layers(scores, layers)
        yield Step('layers', source, layers, Kept())
    if not target.narrows:
        return
    kept: Any = {}
    assert scores.mlp_LF is not None
    assert scores.heads_LN is not None
    assert scores.width_LD is not None
    if target.intermediate_size is not None:
        kept['mlp'] = tuple(most(layer, target.intermediate_size) for layer in scores.mlp_LF)
        yield Step('MLP channels', SlicedSource(source, Kept(**kept)), layers, Kept(**kept))
    if target.num_attention_heads is not None or target.num_key_value_heads is not None:
        found = [most_heads(layer, cfg.num_kv_heads, *_heads(cfg, target)) for layer in scores.heads_LN]
        kept |= {'heads': tuple(heads for heads, _ in found), 'kv_heads': tuple(groups for _, groups in found)}
        yield Step('heads', SlicedSource(source, Kept(**kept)), layers, Kept(**kept))
    if target.hidden_size is not None:
        kept['width'] = most(scores.width_LD.sum(axis=0), target.hidden_size)
        narrow = SlicedSource(source, Kept(**kept))
        scaled = ScaledNorms(narrow, norm_factors(cfg, scores.streams_LD, kept['width']))
        yield Step('hidden dimensions', scaled, layers, Kept(**kept))


def norm_factors(cfg: ModelConfig, streams_LD: np.ndarray | None, width: Ids) -> dict[str, Sequence[float]]:
    """What the norms' scales are multiplied by so that what they return keeps its size.

    The root mean square over the dimensions that stay is larger than that over all, as those matter most; the factor is
    the first over the second, from mean squares over the calibration data. Where the others are always zero it is the
    root of the old width over the new one, and nothing changes. What leaves attention is not measured: the norm before
    the MLP gets the mean of what enters and leaves the layer. Other norms than those of the residual stream stay as
    they are, and so do all of a model with layer norms, or without norms before attention and MLP.
    """
    if streams_LD is None or cfg.norm != 'rms' or not cfg.pre_norms:
        return {}
    square = streams_LD[:, list(width)].mean(axis=1)
    inner = (square[:-1] + square[1:]) / 2
    return {'attn_norm': np.sqrt(square[:-1]), 'mlp_norm': np.sqrt(inner), 'final_norm': np.sqrt(square[-1:])}
