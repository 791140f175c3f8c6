"""Norms with other scales: what they return is a multiple of what it was, and nothing else is touched."""

import pathlib

import jax
import numpy as np

from jpt.checkpoint.opening import open_model
from jpt.checkpoint.scaled import ScaledNorms
from jpt.checkpoint.source import load_tree
from jpt.models.layers import norm

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'


def test_the_factor_is_of_what_a_norm_returns():
    """Of a model with an offset, and with layers in several stacks."""
    source = open_model(MODELS / 'gemma3_irregular').source
    cfg, whole = source.cfg, load_tree(source)
    factors = {'mlp_norm': [1 + layer / 8 for layer in range(cfg.num_layers)], 'final_norm': [0.5]}
    scaled = load_tree(ScaledNorms(source, factors))
    x = np.random.default_rng(0).normal(size=(3, cfg.width)).astype(np.float32)

    def returned(params):
        return norm(cfg, 'norm').clone(parent=None, name=None).apply({'params': params}, x)

    np.testing.assert_allclose(
        returned(scaled['final_norm']), 0.5 * returned(whole['final_norm']), rtol=1e-5, atol=1e-6
    )
    places = [
        (s, k, r) for s, part in enumerate(cfg.segments) for r in range(part.repeats) for k in range(len(part.kinds))
    ]
    for layer, (segment, kind, repeat) in enumerate(places):
        one, other = (
            returned(jax.tree.map(lambda leaf, r=repeat: leaf[r], tree['layers'][segment][kind]['mlp_norm']))
            for tree in (scaled, whole)
        )
        np.testing.assert_allclose(one, (1 + layer / 8) * other, rtol=1e-5, atol=1e-6)
    for tree in (scaled, whole):
        tree.pop('final_norm')
        for segment in tree['layers']:
            for kind in segment:
                kind.pop('mlp_norm')
    jax.tree.map(np.testing.assert_array_equal, scaled, whole)
