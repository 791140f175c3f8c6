"""Canonical parameters <-> the layout that a mesh needs: padded vocabulary, layers grouped by pipeline stage.

Canonical is what `init` returns, what checkpoints hold and what files are exported from: leaves under 'layers' are
stacked [R, ...] on the repeats of their segment. With `pipe` > 1 (or several chunks per device) they become
[pipe, chunks, slots, ...]: chunk c of device i is virtual stage c * pipe + i, so that consecutive stages are
neighbours in the ring. The costliest stage is as cheap as it can be, where a layer costs its kernels' elements (of
experts those that a token passes through); embedding and head, which all devices compute together, count for none.
Stages with fewer layers of a kind than the fullest one have zero slots at the end that nothing reads.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.models.config import Experts
from jpt.sharding.rules import Keys, path_keys

VOCAB_TABLES = (('embed', 'embedding'), ('lm_head', 'kernel'))


class RunSegment(NamedTuple):
    """A period of layer kinds, each named by its (segment, kind) in the whole model, and how often it repeats."""

    kinds: tuple[tuple[int, int], ...]
    repeats: int


class Run(NamedTuple):
    """Consecutive layers of a model: what a stage function needs to know about the layers it is given."""

    segments: tuple[RunSegment, ...]
    first: Any = 0  # number of the first layer in the whole model; a traced int32 inside a pipeline


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one model's parameters are laid out in memory; hashable.

    segments: (number of kinds, repeats) of each segment. vocab: rows of the tables in the canonical layout. costs: of
    a layer of each kind of each segment; none: all layers cost the same.
    """

    segments: tuple[tuple[int, int], ...]
    vocab: int
    padded_vocab: int
    pipe: int = 1
    chunks: int = 1
    costs: tuple[tuple[int, ...], ...] = ()

    @property
    def staged(self) -> bool:
        """Whether leaves under 'layers' are [pipe, chunks, slots, ...]."""
        return self.pipe * self.chunks > 1

    @property
    def num_stages(self) -> int:
        """Virtual stages: chunks of layers that a microbatch passes through, `chunks` of them on each device."""
        return self.pipe * self.chunks

    @property
    def num_layers(self) -> int:
        return sum(kinds * repeats for kinds, repeats in self.segments)


def make_layout(params: Any, sizes: Mapping[str, int], chunks: int = 1, experts: Experts | None = None) -> Layout:
    """The layout of a canonical parameter tree (arrays or ShapeDtypeStructs) on a mesh of these sizes.

    experts: of the model, which say how many of them a token passes through.

    Raises:
        ValueError: fewer layers than stages, or chunks that are not a positive number.
    """
    segments = []
    for segment in params['layers']:
        leaf = jax.tree.leaves(segment)[0]
        segments.append((len(segment), leaf.shape[0]))
    costs = tuple(tuple(_cost(kind, experts) for kind in segment) for segment in params['layers'])
    vocab = params['embed']['embedding'].shape[0]
    multiple = sizes['pipe'] * sizes['tensor']
    layout = Layout(tuple(segments), vocab, -(-vocab // multiple) * multiple, sizes['pipe'], chunks, costs)
    if chunks < 1 or (chunks > 1 and sizes['pipe'] == 1):
        raise ValueError(f'pipeline chunks={chunks} with pipe={sizes["pipe"]}: several chunks need pipe > 1')
    if layout.num_layers < layout.num_stages:
        raise ValueError(
            f'{layout.num_layers} layers cannot fill pipe={layout.pipe} * chunks={chunks} = {layout.num_stages} stages'
        )
    return layout


def _cost(kind: Any, experts: Experts | None) -> int:
    """Elements of the matrices of one layer that a token is multiplied with."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(kind):
        keys = path_keys(path)
        if leaf.ndim < 3:  # the repeats, and a matrix
            continue
        share = experts.per_token / experts.count if experts is not None and 'experts' in keys else 1
        total += round(share * math.prod(leaf.shape[1:]))
    return max(total, 1)


@functools.cache
def stage_bounds(layout: Layout) -> np.ndarray:
    """Where each virtual stage begins: int [stages + 1].

    The largest cost of a stage is the least possible, then the sum of squares, then earlier stages are the longer ones.
    """
    costs = layout.costs or tuple((1,) * kinds for kinds, _ in layout.segments)
    layers = [
        cost for (_, repeats), kinds in zip(layout.segments, costs, strict=True) for cost in repeats * list(kinds)
    ]
    before = [0, *itertools.accumulate(layers)]
    count, stages = len(layers), layout.num_stages
    # best[i]: (largest cost, sum of squares, end of the first stage) of layers i and on, in so many stages.
    best: list[tuple[int, int, int] | None] = [None] * count + [(0, 0, count)]
    ends: list[list[int]] = []
    for left in range(1, stages + 1):
        fresh: list[tuple[int, int, int] | None] = [None] * (count + 1)
        for first in range(count - left + 1):
            options = []
            for end in range(first + 1, count - left + 2):
                rest, own = best[end], before[end] - before[first]
                if rest is not None and (left > 1) == (end < count):
                    options.append((max(own, rest[0]), own * own + rest[1], -end))
            largest, squares, end = min(options)
            fresh[first] = (largest, squares, -end)
        best = fresh
        ends.insert(0, [entry[2] if entry is not None else count for entry in fresh])
    bounds = [0]
    for stage in range(stages):
        bounds.append(ends[stage][bounds[-1]])
    return np.array(bounds)


@functools.cache
def slots_of(layout: Layout) -> dict[tuple[int, int], np.ndarray]:
    """For each (segment, kind): int [pipe, chunks, slots], the repeat that each slot holds, -1 where it is empty."""
    bounds = stage_bounds(layout)
    numbers: dict[tuple[int, int], list[list[int]]] = {}
    layer = 0
    for segment, (kinds, repeats) in enumerate(layout.segments):
        for repeat in range(repeats):
            for kind in range(kinds):
                stages = numbers.setdefault((segment, kind), [[] for _ in range(layout.num_stages)])
                stages[int(np.searchsorted(bounds, layer, side='right')) - 1].append(repeat)
                layer += 1
    return {key: _padded(stages, layout) for key, stages in numbers.items()}


def _padded(stages: list[list[int]], layout: Layout) -> np.ndarray:
    slots = max(len(held) for held in stages)
    table = np.full((layout.num_stages, slots), -1)
    for stage, held in enumerate(stages):
        table[stage, : len(held)] = held
    return table.reshape(layout.chunks, layout.pipe, slots).swapaxes(0, 1)


def run_of(layout: Layout, stage: int) -> Run:
    """The layers of one virtual stage; a stage that begins within a period gets the period rotated."""
    first, last = stage_bounds(layout)[stage : stage + 2].tolist()
    segments: list[RunSegment] = []
    begin = 0
    for segment, (kinds, repeats) in enumerate(layout.segments):
        end = begin + kinds * repeats
        low, high = max(first, begin), min(last, end)
        if low < high:
            rotated = tuple((segment, (low - begin + step) % kinds) for step in range(kinds))
            whole, rest = divmod(high - low, kinds)
            segments += [RunSegment(rotated, whole)] if whole else []
            segments += [RunSegment(rotated[:rest], 1)] if rest else []
        begin = end
    return Run(tuple(segments), first)


def take_run(layers: Any, run: Run) -> Any:
    """The layers of a run, as a list of segments, out of one stage's slots: leaves [slots, ...] -> [repeats, ...]."""
    used: dict[tuple[int, int], int] = {}
    taken = []
    for segment in run.segments:
        period = []
        for key in segment.kinds:
            start = used.get(key, 0)
            used[key] = start + segment.repeats
            period.append(jax.tree.map(lambda leaf, a=start, b=used[key]: leaf[a:b], layers[key[0]][key[1]]))
        taken.append(period)
    return taken


def to_device_layout(layout: Layout, tree: Any) -> Any:
    """Lays out a parameter tree, or any tree that holds copies of it (gradients, optimizer state), from canonical.

    Leaves are numpy or jax arrays; under `jax.jit` or `jax.eval_shape` the tree may be traced or abstract. Other leaves
    of an optimizer state (counters) pass through.

    Raises:
        ValueError: a leaf in the place of a parameter whose first dimension is not the canonical one.
    """
    return jax.tree_util.tree_map_with_path(functools.partial(_to_device, layout), tree)


def to_canonical_layout(layout: Layout, tree: Any) -> Any:
    """The exact inverse of `to_device_layout`; what padding held is dropped."""
    return jax.tree_util.tree_map_with_path(functools.partial(_to_canonical, layout), tree)


def laid_out(change: Callable[[Layout, Any], Any], layout: Layout, tree: Any, wanted: Any) -> Any:
    """A tree in the layout and on the devices of the abstract tree `wanted`; leaves that change make one program.

    change: `to_device_layout` or `to_canonical_layout`. All other leaves are the tree's own.
    """
    same = jax.tree.map(lambda leaf, to: leaf if leaf.shape == to.shape else None, tree, wanted)
    others = jax.tree.map(lambda leaf, to: None if leaf.shape == to.shape else leaf, tree, wanted)
    if not jax.tree.leaves(others):
        return tree
    places = jax.tree.map(lambda leaf, to: None if leaf.shape == to.shape else to.sharding, tree, wanted)
    changed = jax.jit(change, static_argnums=0, out_shardings=places)(layout, others)
    return jax.tree.map(lambda own, new: new if own is None else own, same, changed, is_leaf=lambda leaf: leaf is None)


def _to_device(layout: Layout, path: tuple[Any, ...], leaf: Any) -> Any:
    keys = path_keys(path)
    if _is_table(keys) and layout.padded_vocab > layout.vocab:
        _expect(keys, leaf, (layout.vocab,))
        rows = layout.padded_vocab - layout.vocab
        return _like(leaf).pad(leaf, [(0, rows), *[(0, 0)] * (leaf.ndim - 1)])
    place = _layer_place(keys)
    if place is None or not layout.staged:
        return leaf
    slots = slots_of(layout)[place]
    _expect(keys, leaf, (layout.segments[place[0]][1],))
    empty = (slots < 0).reshape(slots.shape + (1,) * (leaf.ndim - 1))
    return _like(leaf).where(empty, np.zeros((), leaf.dtype), leaf[np.maximum(slots, 0)])


def _to_canonical(layout: Layout, path: tuple[Any, ...], leaf: Any) -> Any:
    keys = path_keys(path)
    if _is_table(keys) and layout.padded_vocab > layout.vocab:
        _expect(keys, leaf, (layout.padded_vocab,))
        return leaf[: layout.vocab]
    place = _layer_place(keys)
    if place is None or not layout.staged:
        return leaf
    slots = slots_of(layout)[place]
    _expect(keys, leaf, slots.shape)
    order = np.argsort(slots.reshape(-1), kind='stable')[np.count_nonzero(slots < 0) :]
    return leaf.reshape(-1, *leaf.shape[3:])[order]


def _like(leaf: Any) -> Any:
    return np if isinstance(leaf, np.ndarray) else jnp


def _is_table(keys: Keys) -> bool:
    return any(keys[i : i + 2] in VOCAB_TABLES for i in range(len(keys) - 1))


def _layer_place(keys: Keys) -> tuple[int, int] | None:
    """The (segment, kind) of a leaf under 'layers', None for any other."""
    if 'layers' not in keys:
        return None
    at = len(keys) - 1 - keys[::-1].index('layers')
    return int(keys[at + 1]), int(keys[at + 2])


def _expect(keys: Keys, leaf: Any, leading: tuple[int, ...]) -> None:
    if tuple(leaf.shape[: len(leading)]) != leading:
        raise ValueError(f'{"/".join(keys)} has shape {tuple(leaf.shape)}: expected it to begin with {leading}')
