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
from jpt.models.transformer import init

TreePath = tuple[str | int, ...]
Role = Literal['embedding', 'kernel', 'bias', 'norm']


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one matrix (or vector, or stack of matrices) of a leaf lies in a checkpoint, and how to get from it there.

    `transposed`: stored (..., in, out), as GPT-2's Conv1D does. `part` of `parts`: a slice of the tensor's output
    dimension `axis`, as in GPT-2's fused projection of queries, keys and values; `interleaved`: every parts-th row.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    axis: int = 0

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The leaf's values, from the tensor in the file."""
        out_first = tensor.swapaxes(-1, -2) if self.transposed else tensor
        size = out_first.shape[self.axis] // self.parts
        return out_first[self.within(slice(0, size), size)]

    def within(self, rows: slice, size: int) -> tuple[slice, ...]:
        """Where rows of the part's own output dimension, which has `size`, lie in the (untransposed) tensor."""
        if self.interleaved:
            own = slice(self.part + rows.start * self.parts, self.part + (rows.stop - 1) * self.parts + 1, self.parts)
        else:
            own = slice(self.part * size + rows.start, self.part * size + rows.stop)
        return (*[slice(None)] * self.axis, own)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor in the file, for a leaf (one source of it) of this shape."""
        whole = tuple(size * self.parts if axis == self.axis else size for axis, size in enumerate(shape))
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
    def own_shape(self) -> tuple[int, ...]:
        """The shape of what one source holds."""
        return self.shape[self.stack :]

    def places(self) -> Iterator[tuple[tuple[int, ...], Source]]:
        """Every source with its place on the leading axes."""
        return zip(np.ndindex(self.shape[: self.stack]), self.sources, strict=True)


@functools.lru_cache(maxsize=64)
def leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of the model's parameter tree, in the order of the network."""
    dialect = FAMILIES[cfg.family].dialect
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    found = [_table(shapes, ('embed', 'embedding'), dialect.embed)]
    if cfg.learned_positions:
        found.append(_table(shapes, ('positions', 'embedding'), dialect.positions))
    for segment, kinds in enumerate(shapes['layers']):
        for kind, tree in enumerate(kinds):
            found += _layer_leaves(cfg, dialect, segment, kind, tree)
    for name, shape in shapes['final_norm'].items():
        source = Source(f'{dialect.final_norm}.{"bias" if name == "bias" else "weight"}')
        found.append(Leaf(('final_norm', name), shape.shape, (source,), 0, 'norm'))
    if not cfg.tied:
        found.append(Leaf(('lm_head', 'kernel'), (cfg.vocab_size, cfg.width), (Source('lm_head.weight'),), 0, 'kernel'))
    return tuple(found)


def _table(shapes: Any, path: TreePath, name: str) -> Leaf:
    return Leaf(path, get(shapes, path).shape, (Source(f'{name}.weight'),), 0, 'embedding')


def _layer_leaves(cfg: ModelConfig, dialect: Dialect, segment: int, kind: int, tree: Any) -> list[Leaf]:
    """The leaves of all layers of one kind, in the order in which the dialect lists their modules."""
    found = []
    for keys, shape in jax.tree_util.tree_leaves_with_path(tree):
        *modules, name = (str(key.key) for key in keys)
        module = '.'.join(modules)
        stored = dialect.place(module, name)
        apart = '{e}' in stored.name
        experts = range(shape.shape[1]) if apart else (0,)
        fused = 'experts' in modules and not apart
        sources = tuple(
            Source(
                f'{dialect.layer_prefix}.{cfg.layer_index(segment, kind, repeat)}.{stored.name.format(e=expert)}',
                stored.transposed,
                stored.part,
                stored.parts,
                stored.interleaved,
                int(fused),
            )
            for repeat in range(shape.shape[0])
            for expert in experts
        )
        path: TreePath = ('layers', segment, kind, *modules, name)
        found.append(Leaf(path, shape.shape, sources, 2 if apart else 1, _role(module, name)))
    order = list(dialect.layer)
    return sorted(found, key=lambda leaf: (order.index(_entry(dialect, leaf)), leaf.path[-1] != 'kernel'))


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
            size = leaf.own_shape[source.axis]
            tensor[source.within(slice(0, size), size)] = values[place]
    return {
        name: np.ascontiguousarray(tensor.swapaxes(-1, -2) if name in transposed else tensor)
        for name, tensor in tensors.items()
    }


def from_hf(cfg: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree (numpy leaves), from tensors under their Hugging Face names."""
    params: dict[str, Any] = {}
    for leaf in leaves(cfg):
        parts = [source.read(tensors[source.name]) for source in leaf.sources]
        put(params, leaf.path, np.stack(parts).reshape(leaf.shape))
    return params
