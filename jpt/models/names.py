"""Which tensor of a Hugging Face checkpoint is which leaf of the parameter tree, in both directions."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from jpt.models.config import ModelConfig
from jpt.models.families import FAMILIES
from jpt.models.families.dialect import Dialect
from jpt.models.transformer import KEPT, init

TreePath = tuple[str | int, ...]
Role = Literal['embedding', 'kernel', 'bias', 'norm']


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one matrix (or vector, or stack of matrices) of a leaf lies in a checkpoint, and how to get from it there.

    `transposed`: stored (..., in, out), as GPT-2's Conv1D does. The rows on the output dimension `axis` are `first` and
    every `step`-th behind it, out of `total`: queries, keys and values in one tensor, gate and up in turns.
    """

    name: str
    total: int
    first: int = 0
    step: int = 1
    transposed: bool = False
    axis: int = 0

    def read(self, tensor: np.ndarray, size: int) -> np.ndarray:
        """The leaf's values, which have `size` rows, from the tensor in the file."""
        out_first = tensor.swapaxes(-1, -2) if self.transposed else tensor
        return out_first[self.within(slice(0, size))]

    def within(self, rows: slice) -> tuple[slice, ...]:
        """Where some of the own rows lie in the (untransposed) tensor."""
        start, stop = (self.first + row * self.step for row in (rows.start, rows.stop))
        return (*[slice(None)] * self.axis, slice(start, max(stop - self.step + 1, start), self.step))

    @property
    def alone(self) -> bool:
        """Whether the rows lie together in the file, one below the other."""
        return not self.transposed and self.step == 1 and self.axis == 0

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor in the file, for a leaf (one source of it) of this shape."""
        whole = (*shape[: self.axis], self.total, *shape[self.axis + 1 :])
        return (*whole[:-2], whole[-1], whole[-2]) if self.transposed else whole


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree: its path, its logical shape, and the sources of its matrices.

    The first `stack` axes of `shape` count what lies in tensors of its own: none for a table, the layer's repeats, or
    repeats and experts. `sources` has one entry for each, the last of these axes varying fastest. `role` says what the
    leaf is for, for sharding and decay.
    """

    path: TreePath
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    stack: int
    role: Role

    @property
    def castable(self) -> bool:
        """Whether a cast of the weights rounds it: not what decides which experts are chosen."""
        return self.path[-1] not in KEPT

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of what one source holds."""
        return self.shape[self.stack :]

    def places(self) -> Iterator[tuple[tuple[int, ...], Source]]:
        """Every source with its place on the leading axes."""
        return zip(np.ndindex(self.shape[: self.stack]), self.sources, strict=True)


# The parts of a tree whose leaves are named one by one; all others stand in `Dialect.ends`.
_PLACED = ('embed', 'positions', 'layers', 'lm_head')


@functools.lru_cache(maxsize=64)
def leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of the model's parameter tree, in the order of the network.

    Raises:
        ValueError: the family has no name for a parameter, or gives two of them the same rows of one tensor.
    """
    dialect = FAMILIES[cfg.family].dialect
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    found = [_table(shapes, ('embed', 'embedding'), dialect.embed)]
    if cfg.learned_positions:
        found.append(_table(shapes, ('positions', 'embedding'), dialect.positions))
    for segment, kinds in enumerate(shapes['layers']):
        for kind, tree in enumerate(kinds):
            found += _layer_leaves(cfg, dialect, segment, kind, tree)
    ends = dialect.ends_of(cfg.tied)
    for keys, shape in jax.tree_util.tree_leaves_with_path({k: v for k, v in shapes.items() if k not in _PLACED}):
        module, name = _name_of(keys)
        source = Source(f'{ends[module]}.{"bias" if name == "bias" else "weight"}', shape.shape[0])
        role: Role = 'embedding' if name == 'embedding' else _role(module, name)
        found.append(Leaf((*module.split('.'), name), shape.shape, (source,), 0, role))
    if not cfg.tied:
        head = Source(f'{dialect.head}.weight', cfg.vocab_size)
        found.append(Leaf(('lm_head', 'kernel'), (cfg.vocab_size, cfg.width), (head,), 0, 'kernel'))
    _check_apart(cfg, found)
    return tuple(found)


def _check_apart(cfg: ModelConfig, found: list[Leaf]) -> None:
    """Raises ValueError where two leaves, or two layers of one, lie in the same rows of one tensor."""
    owners: dict[str, list[tuple[Leaf, range]]] = {}
    for leaf in found:
        for source in leaf.sources:
            own = range(source.first, source.first + leaf.own_shape[source.axis] * source.step, source.step)
            owners.setdefault(source.name, []).append((leaf, own))
    for name, parts in owners.items():
        for (leaf, own), (other, others) in itertools.combinations(parts, 2):
            near = own.start < others.stop and others.start < own.stop
            if near and not set(own).isdisjoint(others):
                paths = ' and '.join('/'.join(map(str, each.path)) for each in (leaf, other))
                raise ValueError(f'{cfg.family} gives {paths} the same rows of the tensor {name}')


def _table(shapes: Any, path: TreePath, name: str) -> Leaf:
    shape = get(shapes, path).shape
    return Leaf(path, shape, (Source(f'{name}.weight', shape[0]),), 0, 'embedding')


def _layer_leaves(cfg: ModelConfig, dialect: Dialect, segment: int, kind: int, tree: Any) -> list[Leaf]:
    """The leaves of all layers of one kind, in the order in which the dialect lists their modules."""
    found = []
    shapes = {_name_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for (module, name), shape in shapes.items():
        stored = dialect.place(module, name, cfg.family)
        apart = '{e}' in stored.name
        fused = 'experts' in module and not apart
        axis = 2 if fused or apart else 1  # of the outputs, in the leaf
        beside = [shapes[other, name][axis] for other in stored.beside if (other, name) in shapes] or [shape[axis]]
        before = stored.beside.index(module) if stored.beside else 0
        sources = tuple(
            Source(
                f'{dialect.layer_prefix}.{cfg.layer_index(segment, kind, repeat)}.{stored.name.format(e=expert)}',
                total=sum(beside),
                first=before if stored.interleaved else sum(beside[:before]),
                step=len(beside) if stored.interleaved else 1,
                transposed=stored.transposed,
                axis=int(fused),
            )
            for repeat in range(shape[0])
            for expert in (range(shape[1]) if apart else (0,))
        )
        path: TreePath = ('layers', segment, kind, *module.split('.'), name)
        found.append(Leaf(path, shape, sources, 2 if apart else 1, _role(module, name)))
    order = list(dialect.layer)
    return sorted(found, key=lambda leaf: (order.index(_entry(dialect, leaf)), leaf.path[-1] != 'kernel'))


def _name_of(keys: tuple[Any, ...]) -> tuple[str, str]:
    """Module and leaf of a path within a layer."""
    *modules, name = (str(key.key) for key in keys)
    return '.'.join(modules), name


def _entry(dialect: Dialect, leaf: Leaf) -> str:
    """The key of the dialect's table under which a leaf of a layer stands."""
    module = '.'.join(map(str, leaf.path[3:-1]))
    exact = f'{module}.{leaf.path[-1]}'
    return exact if exact in dialect.layer else module


def _role(module: str, leaf: str) -> Role:
    if module.endswith('norm'):
        return 'norm'
    return 'kernel' if leaf == 'kernel' else 'bias'


def get(tree: Any, path: TreePath) -> Any:
    """The leaf at a path of a parameter tree."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: dict[str, Any], path: TreePath, leaf: Any) -> None:
    """Sets the leaf at a path, making the dicts and lists on the way."""
    node: Any = tree
    for key, following in itertools.pairwise(path):
        if isinstance(node, list):
            while len(node) <= int(key):
                node.append(None)
            if node[int(key)] is None:
                node[int(key)] = [] if isinstance(following, int) else {}
            node = node[int(key)]
        else:
            node = node.setdefault(key, [] if isinstance(following, int) else {})
    node[path[-1]] = leaf


def to_hf(cfg: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint under their Hugging Face names, from a tree of the parameters' structure."""
    tensors: dict[str, np.ndarray] = {}
    transposed = set()
    for leaf in leaves(cfg):
        values = np.asarray(get(params, leaf.path))
        for place, source in leaf.places():
            if source.transposed:
                transposed.add(source.name)
            whole = dataclasses.replace(source, transposed=False).stored_shape(leaf.own_shape)
            tensor = tensors.setdefault(source.name, np.empty(whole, values.dtype))
            tensor[source.within(slice(0, leaf.own_shape[source.axis]))] = values[place]
    return {
        name: np.ascontiguousarray(tensor.swapaxes(-1, -2) if name in transposed else tensor)
        for name, tensor in tensors.items()
    }


def from_hf(cfg: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree (numpy leaves), from tensors under their Hugging Face names."""
    params: dict[str, Any] = {}
    for leaf in leaves(cfg):
        parts = [source.read(tensors[source.name], leaf.own_shape[source.axis]) for source in leaf.sources]
        put(params, leaf.path, np.stack(parts).reshape(leaf.shape))
    return params
