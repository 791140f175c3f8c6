"""A model with some of its heads, MLP channels and hidden dimensions left out: where a narrower student begins."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jpt.checkpoint.selected import check_described
from jpt.checkpoint.source import NOT_QUANTIZED, Index, LeafSource, whole_weights
from jpt.models.config import ModelConfig
from jpt.models.names import Leaf, leaves

Ids = tuple[int, ...]

# The last keys of a leaf's path -> which of its own axes run over what. Norms over all heads are added by `_axes`.
AXES: dict[str, tuple[str | None, ...]] = {
    'embed/embedding': (None, 'width'),
    'positions/embedding': (None, 'width'),
    'lm_head/kernel': (None, 'width'),
    'final_norm/scale': ('width',),
    'final_norm/bias': ('width',),
    'attn_norm/scale': ('width',),
    'attn_norm/bias': ('width',),
    'attn_post_norm/scale': ('width',),
    'mlp_norm/scale': ('width',),
    'mlp_norm/bias': ('width',),
    'mlp_post_norm/scale': ('width',),
    'attn/q/kernel': ('heads', 'width'),
    'attn/k/kernel': ('kv_heads', 'width'),
    'attn/v/kernel': ('kv_heads', 'width'),
    'attn/out/kernel': ('width', 'heads'),
    'attn/q/bias': ('heads',),
    'attn/k/bias': ('kv_heads',),
    'attn/v/bias': ('kv_heads',),
    'attn/out/bias': ('width',),
    'attn/q_norm/scale': (None,),
    'attn/k_norm/scale': (None,),
    'attn/k_scale': (),
    'attn/v_scale': (),
    'mlp/up/kernel': ('mlp', 'width'),
    'mlp/gate/kernel': ('mlp', 'width'),
    'mlp/down/kernel': ('width', 'mlp'),
    'mlp/up/bias': ('mlp',),
    'mlp/gate/bias': ('mlp',),
    'mlp/down/bias': ('width',),
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays of a model's width, ascending numbers; None: all.

    The hidden dimensions are the same in all layers. MLP channels, kv heads and query heads are named layer by layer,
    equally many in each. Every kv head that stays keeps equally many of its query heads.
    """

    width: Ids | None = None
    mlp: tuple[Ids, ...] | None = None
    heads: tuple[Ids, ...] | None = None
    kv_heads: tuple[Ids, ...] | None = None


class SlicedSource:
    """A source of some of a model's heads, MLP channels and hidden dimensions; head_dim stays as it is.

    Norms are over the dimensions that stay, with the scales that they had. So a model without channels or heads that
    were always zero computes the same, and one without hidden dimensions does not: the root mean square is over fewer.

    Args:
        source: the whole model.
        kept: what stays.

    Raises:
        ValueError: numbers that are none of the model's or do not ascend, query heads that are unevenly spread over kv
            heads, a model whose layers are not plain attention and MLP, or a width that config.json cannot say.
    """

    quantized = NOT_QUANTIZED

    def __init__(self, source: LeafSource, kept: Kept) -> None:
        check_sliced(source.cfg)
        _check(source.cfg, kept)
        self.cfg = narrowed(source.cfg, kept)
        check_described(self.cfg, sizes(self.cfg))
        self._source, self._kept = whole_weights(source, 'a narrower model'), kept
        self._whole = {leaf.path: leaf for leaf in leaves(source.cfg)}

    def dtype(self, leaf: Leaf) -> np.dtype:
        """That of the whole model's leaf."""
        return self._source.dtype(self._whole[leaf.path])

    def read(self, leaf: Leaf, index: Index) -> np.ndarray:
        """A part of a leaf, layer by layer where layers keep different channels."""
        old = self._whole[leaf.path]
        if leaf.path[0] != 'layers':
            return self._taken(old, (), index, _axes(self.cfg, leaf), 0)
        segment, kind = int(leaf.path[1]), int(leaf.path[2])
        parts = [
            self._taken(
                old,
                (slice(repeat, repeat + 1),),
                index[1:],
                _axes(self.cfg, leaf),
                self.cfg.layer_index(segment, kind, repeat),
            )
            for repeat in range(*index[0].indices(leaf.shape[0]))
        ]
        shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
        return np.concatenate(parts) if parts else np.empty(shape, self.dtype(leaf))

    def _taken(self, old: Leaf, stack: Index, index: Index, axes: Sequence[str | None], layer: int) -> np.ndarray:
        """The entries that `index` asks for, by where they are in the whole leaf of one layer."""
        entries = [
            self._entries(axis, layer, size)[part] for axis, size, part in zip(axes, old.own_shape, index, strict=True)
        ]
        cover = tuple(slice(int(ids.min()), int(ids.max()) + 1) if ids.size else slice(0, 0) for ids in entries)
        values = self._source.read(old, (*stack, *cover))
        for axis, (ids, part) in enumerate(zip(entries, cover, strict=True), start=len(stack)):
            values = values.take(ids - part.start, axis=axis)
        return values

    def _entries(self, axis: str | None, layer: int, size: int) -> np.ndarray:
        """The entries that stay along an axis of the whole leaf."""
        if axis is None:
            return np.arange(size)
        ids = getattr(self._kept, axis)
        if ids is None:
            return np.arange(size)
        if axis == 'width':
            return np.asarray(ids)
        own = np.asarray(ids[layer])
        if axis == 'mlp':
            return own
        inner = self.cfg.head_dim
        return (own[:, None] * inner + np.arange(inner)[None]).reshape(-1)


def narrowed(cfg: ModelConfig, kept: Kept) -> ModelConfig:
    """The config of what stays, without modules that predict further tokens."""
    segments = cfg.segments
    if kept.mlp is not None:
        width = len(kept.mlp[0])
        segments = tuple(
            dataclasses.replace(part, kinds=tuple(dataclasses.replace(kind, mlp_width=width) for kind in part.kinds))
            for part in segments
        )
    return dataclasses.replace(
        cfg,
        width=cfg.width if kept.width is None else len(kept.width),
        num_heads=cfg.num_heads if kept.heads is None else len(kept.heads[0]),
        num_kv_heads=cfg.num_kv_heads if kept.kv_heads is None else len(kept.kv_heads[0]),
        segments=segments,
        mtp=(),
    )


def sizes(cfg: ModelConfig) -> str:
    """The sizes of a model under the names of config.json, for messages."""
    return (
        f'hidden_size={cfg.width}, intermediate_size={next(cfg.layer_kinds()).mlp_width}, '
        f'num_attention_heads={cfg.num_heads}, num_key_value_heads={cfg.num_kv_heads}'
    )


def not_sliced(cfg: ModelConfig) -> str | None:
    """What a model has that is not sliced; None where its width, heads and MLP channels can be."""
    kinds = tuple(cfg.layer_kinds())
    parts = {
        'experts': cfg.experts is not None,
        'latent attention': cfg.latent is not None,
        'Mamba layers': cfg.state_space is not None,
        'attention sinks': cfg.sinks,
        'the parts of an encoder': cfg.encoder is not None,
        'layers without attention or without an MLP': any(k.mixer != 'attention' or not k.mlp_width for k in kinds),
    }
    return next((part for part, has in parts.items() if has), None)


def check_sliced(cfg: ModelConfig) -> None:
    """Raises ValueError where a model has parts that are not sliced."""
    part = not_sliced(cfg)
    if part is not None:
        raise ValueError(
            f'{cfg.family} has {part}: only whole layers of it can be left out; heads, MLP channels and hidden '
            'dimensions can be of models whose layers are attention and an MLP'
        )


def _axes(cfg: ModelConfig, leaf: Leaf) -> tuple[str | None, ...]:
    path = [str(key) for key in leaf.path]
    for length in (3, 2):
        found = AXES.get('/'.join(path[-length:]))
        if found is not None:
            if cfg.qk_norm_over_heads and path[-2] in ('q_norm', 'k_norm'):
                return ('heads',) if path[-2] == 'q_norm' else ('kv_heads',)
            return found
    raise ValueError(f'{"/".join(path)} of {cfg.family}: expected a path that ends in one of {", ".join(AXES)}')


def _lists(cfg: ModelConfig, kept: Kept) -> Iterator[tuple[str, tuple[Any, ...], int]]:
    """(name, lists of numbers, how many numbers there are) of everything that is named."""
    yield 'width', () if kept.width is None else (kept.width,), cfg.width
    yield 'mlp', kept.mlp or (), min(kind.mlp_width for kind in cfg.layer_kinds())
    yield 'heads', kept.heads or (), cfg.num_heads
    yield 'kv_heads', kept.kv_heads or (), cfg.num_kv_heads


def _check(cfg: ModelConfig, kept: Kept) -> None:
    for name, lists, count in _lists(cfg, kept):
        if lists and name != 'width' and len(lists) != cfg.num_layers:
            raise ValueError(f'{name}: {len(lists)} lists: expected one for each of {cfg.num_layers} layers')
        for ids in lists:
            if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= count or len(ids) != len(lists[0]):
                raise ValueError(
                    f'{name}={ids}: expected numbers from 0 to {count - 1} that ascend, equally many in every layer'
                )
    per_group = cfg.num_heads // cfg.num_kv_heads
    everything = (tuple(range(cfg.num_heads)),) * cfg.num_layers, (tuple(range(cfg.num_kv_heads)),) * cfg.num_layers
    for heads, groups in zip(kept.heads or everything[0], kept.kv_heads or everything[1], strict=True):
        if len(heads) % len(groups) or [head // per_group for head in heads] != [
            group for group in groups for _ in range(len(heads) // len(groups))
        ]:
            raise ValueError(
                f'heads={heads}, kv_heads={groups}: expected equally many query heads of each kv head that stays, '
                f'which has {per_group}'
            )
