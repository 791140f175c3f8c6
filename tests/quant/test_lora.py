"""Adapters on a parameter tree: which kernels, how they start, and what merging gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.quant.dot import LoraKernel, dot
from jpt.quant.lora import FREEZE_ALL_BUT_LORA, add_lora, lora_scale, merge_lora
from jpt.quant.paths import paths
from jpt.training.freeze import partition


def _params(dtype=np.float32):
    rng = np.random.default_rng(0)

    def linear(out, inner):
        return {'kernel': rng.normal(size=(3, out, inner)).astype(dtype)}

    layer = {'attn': {'q': linear(8, 16), 'v': linear(4, 16)}, 'mlp': {'down': linear(16, 64)}}
    return {'layers': [[layer]], 'lm_head': {'kernel': np.ones((5, 16), dtype)}}


def test_add_lora_wraps_what_the_patterns_cover_and_changes_nothing():
    params = _params()
    adapted = add_lora(
        params,
        jax.random.key(1),
        ['layers/*/attn/{q,v}', 'layers/*/mlp'],
        rank=4,
        alpha=8.0,
        ranks={'**/v': 2},
        alphas={'**/down': 2.0},
    )
    layer = adapted['layers'][0][0]
    kinds = {path: (leaf.a.shape, leaf.b.shape, leaf.scale) for path, leaf in _kernels(layer).items()}
    assert kinds == {
        'q': ((3, 4, 16), (3, 8, 4), 2.0),
        'v': ((3, 2, 16), (3, 4, 2), 4.0),
        'down': ((3, 4, 64), (3, 16, 4), 0.5),
    }
    a = np.asarray(layer['mlp']['down']['kernel'].a)
    # Uniform in +-1/8: extremes near the bound, standard deviation bound / sqrt(3).
    assert 0.118 < np.abs(a).max() <= 0.125
    assert a.std() == pytest.approx(0.125 / np.sqrt(3), rel=0.05)
    assert not np.array_equal(a[0], a[1])
    assert not any(np.asarray(kernel.b).any() for kernel in _kernels(layer).values())
    merged = merge_lora(adapted)
    jax.tree.map(np.testing.assert_array_equal, merged, params)
    trainable, frozen = partition(adapted, FREEZE_ALL_BUT_LORA)
    assert {path.rsplit('/', 1)[1] for path in paths(trainable)} == {'a', 'b'}
    assert len(paths(trainable)) == 6
    assert len(paths(frozen)) == 4


def _kernels(layer) -> dict[str, LoraKernel]:
    modules = {'q': layer['attn']['q'], 'v': layer['attn']['v'], 'down': layer['mlp']['down']}
    return {name: module['kernel'] for name, module in modules.items()}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_merging_gives_the_sum_rounded_once(dtype):
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(3, 2, 16)).astype(np.float32), rng.normal(size=(3, 8, 2)).astype(np.float32)
    params = _params(dtype)
    query = params['layers'][0][0]['attn']['q']
    base = np.asarray(query['kernel'], np.float64)
    query['kernel'] = LoraKernel(query['kernel'], a, b, 0.25)
    merged = merge_lora(params)['layers'][0][0]['attn']['q']['kernel']
    assert merged.dtype == dtype
    exact = base + 0.25 * b.astype(np.float64) @ a.astype(np.float64)
    step = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-22
    assert (np.abs(np.asarray(merged, np.float64) - exact) <= step * np.abs(exact) + 1e-6).all()


def test_the_adapted_product_is_that_of_the_merged_kernel():
    rng = np.random.default_rng(3)
    base, a, b, x = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 16), (2, 16), (8, 2), (2, 16)))
    kernel = LoraKernel(base, a, b, 1.5)
    merged = np.asarray(merge_lora({'k': kernel})['k'])
    np.testing.assert_allclose(jax.jit(dot)(x, kernel), x @ merged.T, rtol=1e-4, atol=1e-5)


def test_scales():
    assert lora_scale(16, 32.0) == 2.0
    assert lora_scale(16, 32.0, rank_stabilized=True) == 8.0


@pytest.mark.parametrize(
    ('targets', 'options', 'message'),
    [
        (['layers/*/attn/qq'], {}, r"lora\.targets: the pattern 'layers/\*/attn/qq' matches nothing: near it are"),
        (['lm_head'], {}, "the pattern 'lm_head' matches nothing"),
        (
            ['layers/*/attn/v'],
            {'rank': 5},
            r'layers/0\.0/attn/v/kernel \[4, 16\]: rank=5: expected 1 to 4',
        ),
        (['layers/*/attn/v'], {'ranks': {'**/q': 2}}, r"the pattern '\*\*/q' matches nothing"),
    ],
)
def test_errors(targets, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(_params(), jax.random.key(0), targets, **({'rank': 2, 'alpha': 2.0} | options))


def test_a_second_adapter_is_refused():
    once = add_lora(_params(), jax.random.key(0), ['layers/*/attn/q'], rank=2, alpha=2.0)
    with pytest.raises(ValueError, match='has an adapter already: merge it first'):
        add_lora(once, jax.random.key(0), ['layers/*/attn/q'], rank=2, alpha=2.0)
