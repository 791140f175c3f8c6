"""The layout that decoding reads parameters in: the same numbers, one layer at a time, kernels turned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.generation.layout import MOST_BYTES, decoding_cache, decoding_params, one_by_one, wants_own_layout
from jpt.models.cache import init_cache
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.quant.dot import LoraKernel, Transposed, dense, dot

LOCAL, GLOBAL = LayerKind(Rope(), 4, 24), LayerKind(Rope(500.0), None, 20)
MIXED = ModelConfig('gemma3_text', 32, 16, 2, 1, 8, (Segment((LOCAL, GLOBAL), 2), Segment((LOCAL,), 1)), 64, tied=True)


def numbered(cfg):
    """A parameter tree in which every layer's numbers are 100 x the layer's index plus a count."""

    def kernels(segment, kind):
        layers = [cfg.layer_index(segment, kind, r) for r in range(cfg.segments[segment].repeats)]
        count = np.arange(6, dtype=np.float32).reshape(3, 2)
        stack = np.stack([100 * layer + count for layer in layers])
        return {'attn': {'q': {'kernel': jnp.asarray(stack)}}, 'attn_norm': {'scale': jnp.asarray(stack[:, :, 0])}}

    layers = [[kernels(s, k) for k in range(len(segment.kinds))] for s, segment in enumerate(cfg.segments)]
    return {'embed': {'embedding': jnp.arange(8.0).reshape(4, 2)}, 'layers': layers}


def test_layers_come_in_the_order_of_the_model_with_turned_kernels():
    cfg = one_by_one(MIXED)
    params = decoding_params(MIXED, numbered(MIXED))
    assert [segment.kinds for segment in cfg.segments] == [(LOCAL,), (GLOBAL,), (LOCAL,), (GLOBAL,), (LOCAL,)]
    for layer, (kind,) in enumerate(params['layers']):
        kernel, scale = kind['attn']['q']['kernel'], kind['attn_norm']['scale']
        assert isinstance(kernel, Transposed)
        assert kernel.shape == (1, 3, 2)
        np.testing.assert_array_equal(kernel.held[0], 100 * layer + np.arange(6).reshape(3, 2).T)
        np.testing.assert_array_equal(scale[0], 100 * layer + np.array([0, 2, 4]))
    # The embedding stays a table to look rows up in; the head is a turned copy of it.
    np.testing.assert_array_equal(params['embed']['embedding'], np.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(params['lm_head']['kernel'].held, np.arange(8.0).reshape(4, 2).T)
    assert not cfg.tied


def test_the_cache_is_taken_apart_in_the_same_order():
    cache = init_cache(MIXED, 2, 3, 'float32')

    def mark(segment, kind, leaf):
        count = MIXED.segments[segment].repeats
        numbers = np.array([MIXED.layer_index(segment, kind, r) for r in range(count)])
        return leaf + (numbers.reshape(-1, 1, 1, 1, 1) if count > 1 else numbers[0])

    marked = [
        [jax.tree.map(lambda leaf, s=s, k=k: mark(s, k, np.asarray(leaf)), entry) for k, entry in enumerate(kinds)]
        for s, kinds in enumerate(cache.layers)
    ]
    layers = decoding_cache(MIXED, cache._replace(layers=marked)).layers
    assert [float(entry.keys.mean()) for (entry,) in layers] == [0, 1, 2, 3, 4]
    assert [entry.values.shape for (entry,) in layers] == [(2, 1, 3, 8)] * 5
    assert [entry.keys.shape for (entry,) in layers] == [(2, 1, 8, 3)] * 5
    alone = decoding_cache(MIXED, init_cache(MIXED, 1, 3, 'float32'))
    assert [entry.keys.shape for (entry,) in alone.layers] == [(1, 8, 3)] * 5, 'a single row has no batch axis'


def test_a_turned_weight_multiplies_as_the_weight_does():
    random = np.random.default_rng(0)
    kernel, x = random.normal(size=(5, 3)).astype(np.float32), random.normal(size=(2, 4, 3)).astype(np.float32)
    weight = Transposed(jnp.asarray(kernel.T))
    assert (weight.shape, weight.ndim, weight.dtype) == ((5, 3), 2, np.float32)
    np.testing.assert_allclose(dot(x, weight), x.astype(np.float64) @ kernel.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dense(weight), kernel)


def test_other_weight_types_are_left_as_they_are():
    params = numbered(MIXED)
    kernel = params['layers'][1][0]['attn']['q']['kernel']
    params['layers'][1][0]['attn']['q']['kernel'] = LoraKernel(kernel, jnp.ones((1, 1, 2)), jnp.ones((1, 3, 1)), 2.0)
    (last,) = decoding_params(MIXED, params)['layers'][-1]
    assert isinstance(last['attn']['q']['kernel'], LoraKernel)
    np.testing.assert_array_equal(last['attn']['q']['kernel'].base, kernel)


@pytest.mark.parametrize(('count', 'mesh', 'wanted'), [(8, False, True), (8, True, False), (MOST_BYTES, False, False)])
def test_only_small_weights_on_one_device_are_copied(count, mesh, wanted):
    params = {'kernel': jax.ShapeDtypeStruct((count,), jnp.float32)}
    on = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)) if mesh else None
    assert wants_own_layout(params, on) is wanted
