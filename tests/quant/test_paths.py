"""Paths of leaves and patterns over them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jpt.quant.dot import LoraKernel
from jpt.quant.paths import map_with_path, matches, paths, select


def _tree():
    leaf = np.zeros(())
    layer = {'attn': {'q': {'kernel': leaf, 'bias': leaf}}, 'mlp': {'up': {'kernel': leaf}}}
    return {'embed': {'embedding': leaf}, 'layers': [[layer, layer], [layer]], 'final_norm': {'scale': leaf}}


def test_paths_join_list_indices_with_a_dot():
    assert paths(_tree()) == [
        'embed/embedding',
        'final_norm/scale',
        'layers/0.0/attn/q/bias',
        'layers/0.0/attn/q/kernel',
        'layers/0.0/mlp/up/kernel',
        'layers/0.1/attn/q/bias',
        'layers/0.1/attn/q/kernel',
        'layers/0.1/mlp/up/kernel',
        'layers/1.0/attn/q/bias',
        'layers/1.0/attn/q/kernel',
        'layers/1.0/mlp/up/kernel',
    ]


def test_fields_of_weight_types_are_parts_of_the_path():
    one = jnp.ones((1, 1))
    tree = {'q': {'kernel': LoraKernel(one, 2 * one, 3 * one, 1.0)}}
    assert paths(tree) == ['q/kernel/base', 'q/kernel/a', 'q/kernel/b']
    doubled = map_with_path(lambda path, x: x if path.endswith('base') else 2 * x, tree)['q']['kernel']
    assert (doubled.base.item(), doubled.a.item(), doubled.b.item()) == (1, 4, 6)


@pytest.mark.parametrize(
    ('pattern', 'path', 'expected'),
    [
        ('layers/*/attn', 'layers/0.0/attn/q/kernel', True),
        ('layers/*/attn/**', 'layers/0.0/attn/q/kernel', True),
        ('layers/*/attn/{q,v}', 'layers/3.1/attn/v/kernel', True),
        ('layers/*/attn/{q,v}', 'layers/3.1/attn/k/kernel', False),
        ('layers/*/attn/q', 'layers/0.0/attn/q_norm/scale', False),
        ('layers/*/attn/q*', 'layers/0.0/attn/q_norm/scale', True),
        ('layers/0.*/mlp', 'layers/0.7/mlp/up/kernel', True),
        ('layers/0.*/mlp', 'layers/10.7/mlp/up/kernel', False),
        ('*/attn', 'layers/0.0/attn', False),
        ('**/kernel/{a,b}', 'layers/0.0/attn/q/kernel/a', True),
        ('**/kernel/{a,b}', 'layers/0.0/attn/q/kernel/base', False),
        ('**/kernel', 'kernel', True),
        ('**/kernel', 'my_kernel', False),
        ('a/**/b', 'a/b', True),
        ('a/**/b', 'a/x/y/b', True),
        ('**', 'anything/at.all', True),
        ('a+b', 'aab', False),
        ('a.b', 'axb', False),
    ],
)
def test_patterns(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_select_joins_patterns_and_refuses_one_that_matches_nothing():
    among = paths(_tree())
    assert select(['embed', 'layers/1.0/attn/**'], among, 'freeze') == {
        'embed/embedding',
        'layers/1.0/attn/q/bias',
        'layers/1.0/attn/q/kernel',
    }
    assert select([], among, 'freeze') == frozenset()
    message = r"config\.freeze: the pattern 'layers/\*/atn/\*\*' matches nothing: near it are .*layers/\*/attn"
    with pytest.raises(ValueError, match=message):
        select(['embed', 'layers/*/atn/**'], among, 'config.freeze')
    with pytest.raises(ValueError, match="'0123456789' matches nothing: there are embed"):
        select(['0123456789'], among, 'config.freeze')
