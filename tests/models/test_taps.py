"""What the mixer of a layer adds to the residual stream, as a tap, against the layer taken apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.models.attention import Attention
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment, StateSpace, runs_of
from jpt.models.layers import norm
from jpt.models.transformer import forward, init, locate

PLAIN = Compute(attention='dense')
TOKENS = np.random.default_rng(0).integers(0, 53, (2, 9)).astype(np.int32)


def norm_of(cfg, params, x):
    return norm(cfg, 'norm').clone(parent=None, name=None).apply({'params': params}, x)


@pytest.mark.parametrize('layer', [0, 5, 6])
def test_attention_is_taken_behind_its_post_norm(mixed, mixed_params, layer):
    """Of a layer in the loop, of the last one there, and of the one behind it."""
    taps = (f'layers.{layer}.input', f'layers.{layer}.attention')
    segment, kind, repeat = (0, layer % 3, layer // 3) if layer < 6 else (1, 0, 0)
    own = jax.tree.map(lambda leaf: leaf[repeat], mixed_params['layers'][segment][kind])
    positions = jnp.broadcast_to(jnp.arange(9)[None], TOKENS.shape)

    @jax.jit
    def run(params, own):
        found = forward(mixed, params, TOKENS, taps=taps, compute=PLAIN).taps
        attention = Attention(mixed, mixed.segments[segment].kinds[kind], PLAIN, parent=None)
        where = locate(mixed, positions, jnp.ones_like(positions), 'float32')
        read = norm_of(mixed, own['attn_norm'], found[taps[0]])
        return found[taps[1]], attention.apply({'params': own['attn']}, read, where, None)[0]

    got, returned = run(mixed_params, own)
    np.testing.assert_allclose(got, norm_of(mixed, own['attn_post_norm'], returned), atol=2e-5)
    assert np.abs(got).max() > 0.1


def test_of_a_layer_that_only_mixes_it_is_all_that_the_layer_adds():
    """A Mamba layer, an MLP, and attention, without a period."""
    kinds = LayerKind(mixer='mamba'), LayerKind(mlp_width=24, mixer='none'), LayerKind(Rope())
    cfg = ModelConfig('nemotron_h', 53, 16, 4, 2, 4, runs_of(kinds), 64, state_space=StateSpace(4, 6, 2, 5, 3))
    params = init(cfg, jax.random.key(0))
    names = [f'layers.{n}.{word}' for n in (0, 2) for word in ('input', 'output', 'attention')]
    run = jax.jit(lambda params: forward(cfg, params, TOKENS, taps=names, compute=PLAIN).taps)
    taps = run(params)
    for n in (0, 2):
        before, after, mixed = (taps[f'layers.{n}.{word}'] for word in ('input', 'output', 'attention'))
        np.testing.assert_allclose(mixed, after - before, atol=1e-5)
        assert np.abs(mixed).max() > 0.1
    with pytest.raises(ValueError, match=r"taps: 'layers\.1\.attention': layer 1 mixes no tokens: expected N of 0, 2"):
        forward(cfg, params, TOKENS, taps=['layers.1.attention'])


def test_the_norm_of_a_sum_is_not_in_it():
    """Of an encoder's layer: the residual stream behind attention is normed, what attention added is not."""
    kind = LayerKind(mlp_width=24)
    cfg = ModelConfig('bert', 53, 16, 4, 4, 4, (Segment((kind,), 1),), 64, pre_norms=False, residual_norms=True)
    bare = dataclasses.replace(cfg, segments=(Segment((dataclasses.replace(kind, mlp_width=0),), 1),))
    params = init(cfg, jax.random.key(0))
    names = ('layers.0.input', 'layers.0.attention', 'layers.0.output')
    taps = forward(bare, params, TOKENS, taps=names, compute=PLAIN).taps
    summed = taps['layers.0.input'] + taps['layers.0.attention']
    scale = params['layers'][0][0]['attn_norm']
    wanted = norm_of(cfg, jax.tree.map(lambda leaf: leaf[0], scale), summed)
    np.testing.assert_allclose(taps['layers.0.output'], wanted, atol=1e-5)
