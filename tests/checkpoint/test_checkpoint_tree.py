"""Names of leaves, what a leaf is, and the comparison of two trees."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpt.checkpoint.tree import (
    LeafSpec,
    differences,
    from_storable,
    listing,
    name_of,
    named_leaves,
    nest,
    spec_of,
    specs_of,
    to_storable,
)


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Codes:
    codes: Any
    scale: Any
    signed: bool = dataclasses.field(metadata={'static': True})


def test_names_are_the_same_for_every_container() -> None:
    tree = {'a': [[1, 2], None], 'b': Pair((3.0,), Codes(True, 5, signed=False)), 'c': None}
    assert named_leaves(tree) == {
        'a/0.0': 1,
        'a/0.1': 2,
        'b/left/0': 3.0,
        'b/right/codes': True,
        'b/right/scale': 5,
    }


def test_the_name_of_a_tree_path_is_the_name_of_its_leaf() -> None:
    tree = {'layers': [[{'attn': {'q': {'kernel': 1}}}]]}
    assert list(named_leaves(tree)) == [name_of(('layers', 0, 0, 'attn', 'q', 'kernel'))]


def test_nest_makes_plain_dicts() -> None:
    assert nest({'a/0.1/k': 1, 'a/0.0/k': 2, 'b': 3}) == {'a': {'0': {'1': {'k': 1}, '0': {'k': 2}}}, 'b': 3}


@pytest.mark.parametrize('key', ['x/y', 'x.y', ''])
def test_keys_that_cannot_be_named_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match='a checkpoint has no key that is empty or has / or'):
        named_leaves({'a': {key: 1}})


@pytest.mark.parametrize(
    ('leaf', 'dtype', 'shape'),
    [
        (np.zeros((2, 3), np.float32), 'float32', (2, 3)),
        (np.zeros(1, ml_dtypes.float8_e4m3fn), 'float8_e4m3fn', (1,)),
        (np.float64(1), 'float64', ()),
        (jax.ShapeDtypeStruct((4,), jnp.bfloat16), 'bfloat16', (4,)),
        (3, 'python int', ()),
        (True, 'python bool', ()),
        (0.5, 'python float', ()),
    ],
)
def test_what_a_leaf_is(leaf: Any, dtype: str, shape: tuple[int, ...]) -> None:
    assert spec_of('x', leaf) == LeafSpec(dtype, shape)


@pytest.mark.parametrize('leaf', ['text', np.array(['text']), np.array([None]), object()])
def test_what_is_no_array_or_number_is_refused(leaf: Any) -> None:
    with pytest.raises(TypeError, match='a/b: a checkpoint holds arrays and numbers, not'):
        spec_of('a/b', leaf)


def test_an_array_without_elements_is_refused() -> None:
    with pytest.raises(ValueError, match=r'a: an array of shape \[0, 3\] has no elements'):
        spec_of('a', np.zeros((0, 3)))


@pytest.mark.parametrize('name', ['threefry2x32', 'rbg', 'unsafe_rbg'])
def test_random_keys_come_back_as_keys_of_their_kind(name: str) -> None:
    key = jax.random.key(5, impl=name)
    spec = spec_of('key', key)
    stored = np.asarray(to_storable(key))
    assert stored.dtype == np.uint32
    again = from_storable(stored, spec)
    assert again.dtype == key.dtype
    np.testing.assert_array_equal(jax.random.key_data(again), jax.random.key_data(key))


@pytest.mark.parametrize('number', [7, True, -0.25])
def test_numbers_come_back_as_numbers(number: Any) -> None:
    again = from_storable(to_storable(number), spec_of('n', number))
    assert again == number
    assert type(again) is type(number)


def test_differences_name_every_leaf_once() -> None:
    stored = {'same': LeafSpec('int8', (1,)), 'gone': LeafSpec('int8', (2,)), 'cast': LeafSpec('bfloat16', (2, 3))}
    wanted = {'same': LeafSpec('int8', (1,)), 'new': LeafSpec('int8', ()), 'cast': LeafSpec('float32', (2, 3))}
    assert differences(stored, wanted) == [
        'new: not in the checkpoint, expected int8[]',
        'gone: int8[2] in the checkpoint, not expected',
        'cast: bfloat16[2, 3] in the checkpoint, expected float32[2, 3]',
    ]
    assert differences(stored, stored) == []


def test_keys_of_different_kinds_differ() -> None:
    kinds = [specs_of({'key': jax.random.key(0, impl=name)}) for name in ('threefry2x32', 'rbg')]
    assert differences(*kinds) == ['key: key<fry>[] in the checkpoint, expected key<rbg>[]']


def test_long_lists_are_cut_with_a_count() -> None:
    text = listing([f'leaf {n}' for n in range(50)])
    assert 'leaf 19' in text
    assert 'leaf 20' not in text
    assert text.endswith('... and 30 more')
