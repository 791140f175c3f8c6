"""Which tensor of a Hugging Face checkpoint is which leaf of the parameter tree, in both directions."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jpt.models.cache import CACHE_SCALES
from jpt.models.config import ModelConfig
from jpt.models.families import FAMILIES
from jpt.models.families.dialect import Dialect
from jpt.models.transformer import KEPT, init
from jpt.quant.tensors import PARTS, QTensor

# In a training run's parameters: what is trained beside the model and is no part of it. Models are opened without it.
BESIDE = 'projections'

TreePath = tuple[str | int, ...]
Role = Literal['embedding', 'kernel', 'bias', 'norm']


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one matrix (or vector, or stack of matrices) of a leaf lies in a checkpoint, and how to get from it there.

    `transposed`: stored (..., in, out), as GPT-2's Conv1D does. The rows on the output dimension `axis` are `first` and
    every `step`-th behind it, out of `total`: queries, keys and values in one tensor, gate and up in turns. `copies`:
    names under which the file holds the tensor once more.
    """

    name: str
    total: int
    first: int = 0
    step: int = 1
    transposed: bool = False
    axis: int = 0
    copies: tuple[str, ...] = ()

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
        if not shape:
            return ()
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
        """Whether a cast of the weights rounds it: not what decides which experts are chosen, nor codes and scales."""
        return self.path[-1] not in KEPT and self.part is None

    @property
    def part(self) -> str | None:
        """Which part of a quantized weight this is, if any: codes, scale and so on."""
        *above, last = self.path
        return str(last) if above and above[-1] == 'kernel' and last in PARTS else None

    @property
    def cache_scale(self) -> bool:
        """Whether this is a scale of the keys or values that a cache holds as codes."""
        return self.path[-1] in CACHE_SCALES

    @property
    def weight_path(self) -> TreePath:
        """The path of the weight that this is, or is a part of."""
        return self.path if self.part is None else self.path[:-1]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of what one source holds; () for a number."""
        return self.shape[self.stack :]

    def places(self) -> Iterator[tuple[tuple[int, ...], Source]]:
        """Every source with its place on the leading axes."""
        return zip(np.ndindex(self.shape[: self.stack]), self.sources, strict=True)


# The parts of a tree whose leaves are named one by one; all others stand in `Dialect.ends`.
_PLACED = ('embed', 'positions', 'layers', 'mtp', 'lm_head')


@functools.lru_cache(maxsize=64)
def leaves(cfg: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of the model's parameter tree, in the order of the network.

    Raises:
        ValueError: the family has no name for a parameter, or gives two of them the same rows of one tensor.
    """
    dialect = FAMILIES[cfg.family].dialect
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    of_embed, of_head = (_in_modules(cfg, dialect, name) for name in (dialect.mtp_embed, dialect.mtp_head))
    if cfg.tied:
        of_embed = of_embed + of_head
    found = [_table(shapes, ('embed', 'embedding'), dialect.embed, of_embed)]
    if cfg.learned_positions:
        found.append(_table(shapes, ('positions', 'embedding'), dialect.positions))
    for segment, kinds in enumerate(shapes['layers']):
        for kind, tree in enumerate(kinds):
            numbers = [cfg.layer_index(segment, kind, repeat) for repeat in range(cfg.segments[segment].repeats)]
            found += _layer_leaves(cfg, dialect, ('layers', segment, kind), numbers, tree)
    ends = dialect.ends_of(cfg.tied)
    for keys, shape in jax.tree_util.tree_leaves_with_path({k: v for k, v in shapes.items() if k not in _PLACED}):
        module, name = _name_of(keys)
        source = Source(f'{ends[module]}.{"bias" if name == "bias" else "weight"}', shape.shape[0])
        role: Role = 'embedding' if name == 'embedding' else _role(module, name)
        found.append(Leaf((*module.split('.'), name), shape.shape, (source,), 0, role))
    if not cfg.tied:
        head = Source(f'{dialect.head}.weight', cfg.vocab_size, copies=tuple(of_head))
        found.append(Leaf(('lm_head', 'kernel'), (cfg.vocab_size, cfg.width), (head,), 0, 'kernel'))
    for depth, module in enumerate(shapes.get('mtp', ())):
        path, numbers = ('mtp', depth), [cfg.num_layers + depth]
        own = {name: part for name, part in module.items() if name != 'layer'}
        found += _layer_leaves(cfg, dataclasses.replace(dialect, layer=dialect.mtp), path, numbers, own, stacked=False)
        found += _layer_leaves(cfg, dialect, (*path, 'layer'), numbers, module['layer'], stacked=False)
    _check_apart(cfg, found)
    return tuple(found)


def _check_apart(cfg: ModelConfig, found: list[Leaf]) -> None:
    """Raises ValueError where two leaves, or two layers of one, lie in the same rows of one tensor."""
    owners: dict[str, list[tuple[Leaf, range]]] = {}
    for leaf in found:
        for source in leaf.sources:
            rows = leaf.own_shape[source.axis] if leaf.own_shape else 1
            own = range(source.first, source.first + rows * source.step, source.step)
            owners.setdefault(source.name, []).append((leaf, own))
    for name, parts in owners.items():
        for (leaf, own), (other, others) in itertools.combinations(parts, 2):
            near = own.start < others.stop and others.start < own.stop
            if near and not set(own).isdisjoint(others):
                paths = ' and '.join('/'.join(map(str, each.path)) for each in (leaf, other))
                raise ValueError(f'{cfg.family} gives {paths} the same rows of the tensor {name}')


def _in_modules(cfg: ModelConfig, dialect: Dialect, name: str) -> list[str]:
    """The names of a kernel in the MTP modules, which stand behind the layers."""
    return [f'{dialect.layer_prefix}.{cfg.num_layers + depth}.{name}.weight' for depth in range(len(cfg.mtp))]


def _table(shapes: Any, path: TreePath, name: str, copies: Sequence[str] = ()) -> Leaf:
    shape = get(shapes, path).shape
    return Leaf(path, shape, (Source(f'{name}.weight', shape[0], copies=tuple(copies)),), 0, 'embedding')


def _layer_leaves(
    cfg: ModelConfig, dialect: Dialect, path: TreePath, numbers: Sequence[int], tree: Any, *, stacked: bool = True
) -> list[Leaf]:
    """The leaves of layers of one kind, by their numbers, in the order in which the dialect lists their modules.

    `path` is where the tree stands among the parameters. Leaves are stacked on the layers, or those of a single one.
    """
    found = []
    first = int(stacked)  # axis of a leaf behind the stack
    shapes = {_name_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for (module, name), shape in shapes.items():
        stored = dialect.place(module, name, cfg.family)
        apart = '{e}' in stored.name
        fused = 'experts' in module and not apart
        axis = first + (fused or apart)  # of the outputs, in the leaf
        rows = shape[axis] if shape[axis:] else 1
        beside = [shapes[other, name][axis] for other in stored.beside if (other, name) in shapes] or [rows]
        before = stored.beside.index(module) if stored.beside else 0
        sources = tuple(
            Source(
                f'{dialect.layer_prefix}.{number}.{stored.name.format(e=expert)}',
                total=sum(beside),
                first=before if stored.interleaved else sum(beside[:before]),
                step=len(beside) if stored.interleaved else 1,
                transposed=stored.transposed,
                axis=int(fused),
            )
            for number in numbers
            for expert in (range(shape[first]) if apart else (0,))
        )
        found.append(Leaf((*path, *module.split('.'), name), shape, sources, first + apart, _role(module, name)))
    order = list(dialect.layer)

    def place(leaf: Leaf) -> tuple[int, bool]:
        *module, name = map(str, leaf.path[len(path) :])
        exact = '.'.join((*module, name))
        if leaf.cache_scale:
            return order.index('attn.out'), True
        return order.index(exact if exact in dialect.layer else '.'.join(module)), name != 'kernel'

    return sorted(found, key=place)


def _name_of(keys: tuple[Any, ...]) -> tuple[str, str]:
    """Module and leaf of a path within a layer."""
    *modules, name = (str(key.key) for key in keys)
    return '.'.join(modules), name


def _role(module: str, leaf: str) -> Role:
    if module.endswith('norm'):
        return 'norm'
    return 'kernel' if leaf == 'kernel' else 'bias'


def get(tree: Any, path: TreePath) -> Any:
    """The leaf at a path of a parameter tree, or a part of a quantized weight."""
    for key in path:
        tree = getattr(tree, str(key)) if isinstance(tree, QTensor) else tree[key]
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
            shape = dataclasses.replace(source, transposed=False).stored_shape(leaf.own_shape)
            tensor = tensors.setdefault(source.name, np.empty(shape, values.dtype))
            tensor[source.within(slice(0, leaf.own_shape[source.axis])) if shape else ()] = values[place]
    whole = {
        name: np.ascontiguousarray(tensor.swapaxes(-1, -2) if name in transposed else tensor)
        for name, tensor in tensors.items()
    }
    return whole | {
        copy: whole[source.name] for leaf in leaves(cfg) for source in leaf.sources for copy in source.copies
    }


def from_hf(cfg: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree (numpy leaves), from tensors under their Hugging Face names."""
    params: dict[str, Any] = {}
    for leaf in leaves(cfg):
        own = leaf.own_shape
        parts = [
            source.read(tensors[source.name], own[source.axis]) if own else tensors[source.name]
            for source in leaf.sources
        ]
        put(params, leaf.path, np.stack(parts).reshape(leaf.shape))
    return params
