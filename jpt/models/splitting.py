"""Segments cut anew: layers of one kind that differ in their weights' formats stand in segments of their own.

Nothing but the stacking changes: the layers, their numbers and their order stay. A model whose layers all differ is
traced layer by layer, and takes as long to compile as if there were no loop.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jpt.models.config import LayerKind, ModelConfig, Segment, runs_of
from jpt.models.transformer import Params


def places(cfg: ModelConfig) -> list[tuple[tuple[int, int], int]]:
    """((segment, kind), repeat) of every layer, in order."""
    return [
        ((segment, kind), repeat)
        for segment, part in enumerate(cfg.segments)
        for repeat in range(part.repeats)
        for kind in range(len(part.kinds))
    ]


def joined(cfg: ModelConfig) -> ModelConfig:
    """The model with the segments that its kinds of layers alone would have."""
    return dataclasses.replace(cfg, segments=runs_of(tuple(cfg.layer_kinds())))


def split(cfg: ModelConfig, marks: Sequence[Hashable]) -> ModelConfig:
    """The model with segments in which layers that are stacked together have the same mark; itself where they have.

    Args:
        cfg: the model.
        marks: of every layer, in order.
    """
    stacks: dict[tuple[int, int], set[Hashable]] = {}
    for (place, _), mark in zip(places(cfg), marks, strict=True):
        stacks.setdefault(place, set()).add(mark)
    if all(len(each) == 1 for each in stacks.values()):
        return cfg
    # Kinds are only compared: those of two layers are the same where kind and mark are.
    pairs = cast(tuple[LayerKind, ...], tuple(zip(cfg.layer_kinds(), marks, strict=True)))
    segments = []
    for run in runs_of(pairs):
        kinds = cast(tuple[tuple[LayerKind, Hashable], ...], run.kinds)
        segments.append(Segment(tuple(kind for kind, _ in kinds), run.repeats))
    return dataclasses.replace(cfg, segments=tuple(segments))


def restacked(cfg: ModelConfig, params: Params, wanted: ModelConfig) -> Params:
    """The parameters of a model whose layers are stacked as `wanted` has them."""
    if cfg.segments == wanted.segments:
        return params
    before = places(cfg)
    layers: list[list[Any]] = []
    for at, segment in enumerate(wanted.segments):
        layers.append([])
        for kind in range(len(segment.kinds)):
            numbers = [wanted.layer_index(at, kind, repeat) for repeat in range(segment.repeats)]
            parts = []
            for (where, which), run in itertools.groupby((before[number] for number in numbers), lambda each: each[0]):
                rows = jnp.array([repeat for _, repeat in run])
                parts.append(jax.tree.map(lambda leaf, rows=rows: leaf[rows], params['layers'][where][which]))
            layers[-1].append(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))
    return {**params, 'layers': layers}
