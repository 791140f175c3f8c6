"""Partition and merge of parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.quant.dot import LoraKernel
from jpt.quant.paths import paths
from jpt.training.freeze import merge, partition


def _params():
    kernel = LoraKernel(np.ones((2, 3)), np.ones((1, 3)), np.ones((2, 1)), 2.0)
    return {
        'embed': {'embedding': np.arange(6.0).reshape(2, 3)},
        'layers': [[{'attn': {'q': {'kernel': kernel}}, 'attn_norm': {'scale': np.ones(3)}}]],
        'lm_head': {'kernel': np.zeros((2, 3))},
    }


def test_partition_makes_holes_and_merge_fills_them():
    params = _params()
    trainable, frozen = partition(params, ['embed', 'layers/*/attn/**/base', '**/scale'])
    assert paths(trainable) == ['layers/0.0/attn/q/kernel/a', 'layers/0.0/attn/q/kernel/b', 'lm_head/kernel']
    assert paths(frozen) == ['embed/embedding', 'layers/0.0/attn/q/kernel/base', 'layers/0.0/attn_norm/scale']
    assert trainable['embed']['embedding'] is None
    back = merge(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_an_exclamation_mark_takes_back():
    trainable, _ = partition(_params(), ['**', '!lm_head'])
    assert paths(trainable) == ['lm_head/kernel']


def test_no_patterns_freeze_nothing():
    params = _params()
    trainable, frozen = partition(params, [])
    assert len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(params))
    assert jax.tree.leaves(frozen) == []


def test_gradients_flow_to_the_trainable_tree_only():
    trainable, frozen = partition(_params(), ['**', '!lm_head'])

    def loss(trainable):
        return jnp.sum(jnp.square(merge(trainable, frozen)['lm_head']['kernel'] - 1))

    gradients = jax.jit(jax.grad(loss))(trainable)
    assert paths(gradients) == ['lm_head/kernel']
    np.testing.assert_array_equal(gradients['lm_head']['kernel'], np.full((2, 3), -2.0))


def test_errors():
    with pytest.raises(ValueError, match=r"config\.freeze: the pattern 'lm_hed' matches nothing: near it are lm_head"):
        partition(_params(), ['lm_hed'], 'config.freeze')
    with pytest.raises(ValueError, match='nothing is left to train'):
        partition(_params(), ['**'])
    with pytest.raises(ValueError, match='in both trees'):
        merge({'a': 1.0}, {'a': 2.0})
