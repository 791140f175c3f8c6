"""A model in other segments: the same layers, names and outputs."""

import dataclasses

import jax
import numpy as np
import pytest

from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.names import to_hf
from jpt.models.splitting import joined, places, restacked, split
from jpt.models.transformer import forward, init

FULL, NEAR = LayerKind(mlp_width=24, rope=Rope()), LayerKind(mlp_width=24, rope=Rope(), window=4)
CFG = ModelConfig(
    family='gemma3_text', vocab_size=31, width=16, num_heads=4, num_kv_heads=2, head_dim=4, max_length=32,
    segments=(Segment((NEAR, FULL), 3), Segment((NEAR,), 1)), norm_offset=1.0, post_norms=True, qk_norm=True,
    embed_scale=4.0, activation='gelu_tanh', tied=True,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))


def test_layers_with_the_same_mark_stay_together():
    assert split(CFG, ['a', 'b'] * 3 + ['c']) is CFG
    cut = split(CFG, 'aaaaaba')
    assert list(cut.layer_kinds()) == list(CFG.layer_kinds())
    stacks = {}
    for number, (place, _) in enumerate(places(cut)):
        stacks.setdefault(place, set()).add('aaaaaba'[number])
    assert all(len(marks) == 1 for marks in stacks.values())
    assert joined(cut) == joined(CFG)
    assert sum(len(part.kinds) for part in cut.segments) == 5  # layers traced: two of four, then three
    with pytest.raises(ValueError, match='zip'):
        split(CFG, 'ab')


def test_a_model_in_other_segments_is_the_same_model():
    keys = iter(jax.random.split(jax.random.key(1), 64))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), init(CFG, jax.random.key(0)))
    cut = split(CFG, 'abbacca')
    assert cut != CFG
    made = restacked(CFG, params, cut)
    whole = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(lambda: init(cut, jax.random.key(0))))
    assert jax.tree.map(lambda leaf: leaf.shape, made) == whole
    one, other = to_hf(CFG, params), to_hf(cut, made)
    assert sorted(one) == sorted(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)
    before, after = (
        jax.jit(forward, static_argnums=0)(cfg, tree, TOKENS).hidden_BTD for cfg, tree in ((CFG, params), (cut, made))
    )
    np.testing.assert_allclose(before, after, rtol=2e-5, atol=2e-5)
    back = restacked(cut, made, CFG)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert restacked(CFG, params, dataclasses.replace(CFG, max_length=64)) is params
