"""Which implementation `attention` picks, what it refuses, decoding over a cache with holes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_attention import attention_and_gradients

from jpt.kernels.attention import FEW_QUERIES, attention
from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.cudnn_attention import refusal
from jpt.kernels.masks import Mask


def abstract(T, S, N=4, K=2, H=16, dtype=jnp.float32):
    q, k = jax.ShapeDtypeStruct((2, T, N, H), dtype), jax.ShapeDtypeStruct((2, S, K, H), dtype)
    places = [jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (T, S, T, S)]
    return q, k, k, places


def call(q, k, v, places, **options):
    names = ('q_positions_BT', 'k_positions_BS', 'q_segments_BT', 'k_segments_BS')
    return attention(q, k, v, **dict(zip(names, places, strict=True)), scale=0.25, **options)


def primitives(T, S, **options):
    """Names of the operations of the traced program, the outermost ones."""
    jaxpr = jax.make_jaxpr(lambda *args: call(*args, **options))(*abstract(T, S))
    return {eqn.primitive.name for eqn in jaxpr.jaxpr.eqns}


def test_auto_is_dense_for_a_few_queries_and_blockwise_for_many():
    assert 'custom_vjp_call' not in primitives(FEW_QUERIES, 64)
    assert 'custom_vjp_call' in primitives(FEW_QUERIES + 1, 64)
    assert 'custom_vjp_call' in primitives(1, 64, implementation='blockwise')
    assert 'custom_vjp_call' not in primitives(64, 64, implementation='dense')


@pytest.mark.parametrize('implementation', ['dense', 'blockwise'])
def test_decoding_over_a_cache_with_unused_slots(implementation):
    """Three queries at the end of two rows of different length; slots behind a row's end have segment 0 and garbage."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 3, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8)))
    slots = np.tile(np.arange(40, dtype=np.int32), (2, 1))
    ends = np.array([[20], [33]])
    k_segments = (slots < ends).astype(np.int32)
    q_positions = (ends - 3 + np.arange(3)).astype(np.int32)
    places = (q_positions, slots, np.ones((2, 3), np.int32), k_segments)
    v[slots >= ends] = 1e6
    with jax.enable_x64(True):
        run = jax.jit(lambda *args: call(*args, window=9, implementation=implementation))
        out = np.asarray(run(q, k, v, places))
    expected, _ = attention_and_gradients(q, k, v, np.zeros_like(q), places, 0.25, window=9)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


def test_unknown_names_and_heads_are_refused():
    q, k, v, places = abstract(32, 32)
    with pytest.raises(ValueError, match=r"implementation='flash': expected one of auto, blockwise, dense, cudnn"):
        call(q, k, v, places, implementation='flash')
    with pytest.raises(ValueError, match=r"context='rings': expected one of ring, gather"):
        call(q, k, v, places, context='rings')
    with pytest.raises(ValueError, match='4 query heads are not a multiple of 3 kv heads'):
        call(*abstract(32, 32, K=3))
    with pytest.raises(ValueError, match=r"implementation='cudnn' cannot be used: the platform is cpu, not gpu"):
        call(q, k, v, places, implementation='cudnn', plain_rows=True)


def test_query_heads_must_divide_over_tensor():
    mesh = jax.sharding.AbstractMesh((4,), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match='6 query heads do not divide over tensor=4'),
    ):
        jax.eval_shape(call, *abstract(32, 32, N=6))


REFUSALS = {
    'dtype': ({'dtype': jnp.float32}, {}, 'the dtype is float32'),
    'wide heads': ({'H': 264}, {}, 'the head dimension 264'),
    'odd heads': ({'H': 20}, {}, 'the head dimension 20'),
    'soft cap': ({}, {'soft_cap': 5.0}, 'soft cap'),
    'chunk': ({}, {'chunk': 4}, 'chunked'),
    'window': ({}, {'window': 4, 'causal': False}, 'window without a causal mask'),
    'packed': ({}, {'plain_rows': False}, 'not declared plain'),
    'cache': ({'S': 48}, {}, 'not declared plain'),
    'sinks': ({}, {'sinks': True}, 'sinks'),
}


@pytest.mark.parametrize('name', REFUSALS)
def test_cudnn_is_refused_where_it_computes_something_else(name, monkeypatch):
    shapes, options, reason = REFUSALS[name]
    monkeypatch.setattr('jpt.kernels.cudnn_attention.platform', lambda: 'gpu')
    q, k, v, _ = abstract(**{'T': 32, 'S': 32, 'dtype': jnp.bfloat16, **shapes})
    mask = Mask(options.get('causal', True), options.get('window'), options.get('chunk'))
    sinks = jax.ShapeDtypeStruct((4,), jnp.float32) if options.get('sinks') else None
    scores = Scores(mask, 0.25, options.get('soft_cap'))
    found = refusal(q, k, v, scores, sinks, options.get('plain_rows', True))
    assert found is not None
    assert reason in found


def test_cudnn_is_taken_for_plain_rows_of_bfloat16(monkeypatch):
    monkeypatch.setattr('jpt.kernels.cudnn_attention.platform', lambda: 'gpu')
    q, k, v, _ = abstract(32, 32, dtype=jnp.bfloat16)
    assert refusal(q, k, v, Scores(Mask(window=8), 0.25), None, plain_rows=True) is None
