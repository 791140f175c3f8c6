"""Trees as checkpoints hold them: leaves by name, what each of them is, and the comparison of two such descriptions.

A name is the path of `jpt.quant.paths` ('params/layers/0.0/attn/q/kernel'), whatever containers the tree is made of, so
that a checkpoint outlives a change of container. None is no leaf. Typed random keys are stored as their bits.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jpt.quant.paths import path_of

LISTED = 20  # names in one message
NUMBERS = (bool, int, float)  # exactly these: numpy's float64 is a subclass of float
KEY_IMPLEMENTATIONS = {'key<fry>': 'threefry2x32', 'key<rbg>': 'rbg', 'key<urbg>': 'unsafe_rbg'}


class LeafSpec(NamedTuple):
    """A leaf without its values. `dtype` is numpy's name, 'key<...>' for typed random keys, or e.g. 'python int'."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f'{self.dtype}{list(self.shape)}'


def name_of(path: Iterable[str | int]) -> str:
    """The name of a leaf of nested dicts and lists, from its keys and indices."""
    keys = jax.tree_util
    return path_of([keys.SequenceKey(key) if isinstance(key, int) else keys.DictKey(key) for key in path])


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves of a pytree by name, in tree order.

    Raises:
        ValueError: a key that cannot be part of a name, or two leaves of one name.
    """
    found: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for key in keys:
            text = next(str(getattr(key, field)) for field in ('key', 'name', 'idx') if hasattr(key, field))
            if not text or '/' in text or '.' in text:
                raise ValueError(f'{path_of(keys)}: key {text!r}: a checkpoint has no key that is empty or has / or .')
        name = path_of(keys)
        if name in found:
            raise ValueError(f'{name}: two leaves of the tree have this name')
        found[name] = leaf
    return found


def statics_of(tree: Any) -> dict[str, Any]:
    """The static fields of the dataclasses in a tree, by name: a LoRA scale, whether 8-bit codes are signed.

    They are no leaves, but a leaf means something else where they differ. Values are as JSON gives them back.
    """
    found: dict[str, Any] = {}

    def walk(above: tuple[Any, ...], node: Any) -> None:
        def inside(other: Any) -> bool:
            return other is not node and dataclasses.is_dataclass(other)

        for keys, item in jax.tree_util.tree_leaves_with_path(node, is_leaf=inside):
            if item is node or not dataclasses.is_dataclass(item):
                continue
            for field in dataclasses.fields(item):
                if field.metadata.get('static'):
                    name = path_of([*above, *keys, jax.tree_util.GetAttrKey(field.name)])
                    found[name] = json.loads(json.dumps(getattr(item, field.name), default=_as_json))
            walk((*above, *keys), item)

    walk((), tree)
    return found


def _as_json(value: Any) -> Any:
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else str(value)


def parts_of(name: str) -> list[str]:
    """The parts of a name; each is a level of the stored tree."""
    return re.split(r'[/.]', name)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by name: the tree as it is stored."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *above, last = parts_of(name)
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def is_key(leaf: Any) -> bool:
    """Whether a leaf, or an abstract one, is an array of typed random keys."""
    return hasattr(leaf, 'dtype') and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def spec_of(name: str, leaf: Any) -> LeafSpec:
    """What a leaf is.

    Raises:
        TypeError: neither an array (concrete or abstract) nor a number; strings belong in the config.
        ValueError: an array without elements, which Orbax does not store.
    """
    if type(leaf) in NUMBERS:
        return LeafSpec(f'python {type(leaf).__name__}', ())
    is_array = hasattr(leaf, 'dtype') and hasattr(leaf, 'shape')
    if not is_array or (not is_key(leaf) and leaf.dtype.kind in 'OSU'):
        raise TypeError(f'{name}: a checkpoint holds arrays and numbers, not {type(leaf).__name__} {leaf!r:.80}')
    if 0 in leaf.shape:
        raise ValueError(f'{name}: an array of shape {list(leaf.shape)} has no elements and cannot be stored')
    if is_key(leaf) and str(leaf.dtype) not in KEY_IMPLEMENTATIONS:
        raise TypeError(f'{name}: random keys {leaf.dtype}: expected one of {", ".join(KEY_IMPLEMENTATIONS)}')
    return LeafSpec(str(leaf.dtype), tuple(leaf.shape))


def specs_of(flat: Mapping[str, Any]) -> dict[str, LeafSpec]:
    """What each leaf is, by name."""
    return {name: spec_of(name, leaf) for name, leaf in flat.items()}


def differences(stored: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec]) -> list[str]:
    """One line per leaf that a restore would lack, leave over, reshape or cast; empty where the trees agree."""
    lines = [f'{name}: not in the checkpoint, expected {wanted[name]}' for name in wanted if name not in stored]
    lines += [f'{name}: {stored[name]} in the checkpoint, not expected' for name in stored if name not in wanted]
    for name, spec in wanted.items():
        if name in stored and stored[name] != spec:
            lines.append(f'{name}: {stored[name]} in the checkpoint, expected {spec}')
    return lines


def static_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line per static field of both trees that differs; fields of one tree alone show as leaves of it alone."""
    names = [name for name in wanted if name in stored and stored[name] != wanted[name]]
    return [f'{name}: {stored[name]!r} in the checkpoint, expected {wanted[name]!r}' for name in names]


def listing(lines: list[str]) -> str:
    """Lines for a message, cut off with a count where they are many."""
    more = [f'... and {len(lines) - LISTED} more'] if len(lines) > LISTED else []
    return '\n  '.join(lines[:LISTED] + more)


def to_storable(leaf: Any) -> Any:
    """The array that stands for a leaf on disk: numbers as 0-d arrays, random keys as their bits."""
    if type(leaf) in NUMBERS or isinstance(leaf, np.generic):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def from_storable(value: Any, spec: LeafSpec) -> Any:
    """The leaf that `to_storable` turned into this array."""
    if spec.dtype.startswith('python '):
        return np.asarray(value).item()
    if spec.dtype.startswith('key<'):
        return jax.random.wrap_key_data(jax.numpy.asarray(value), impl=KEY_IMPLEMENTATIONS[spec.dtype])
    return value
