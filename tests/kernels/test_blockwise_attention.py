"""Our attention against float64 numpy, with every option in company of the others, and what it must never do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_attention import attention_and_gradients, packed_places

from jpt.kernels.attention import attention
from jpt.kernels.blockwise_attention import Scores, Tile
from jpt.kernels.masks import Mask, Places
from jpt.kernels.parallel_attention import Options, parallel_attention

B, T, H, Hv, SCALE = 3, 21, 8, 6, 0.4
TOLERANCE = {'float64': 1e-12, 'float32': 2e-6, 'bfloat16': 1.5e-2}

# Pairwise: mask, soft cap, sinks, heads (query, kv), tile (one row or several, ragged or whole), dtype.
CASES = {
    'causal': {'tile': (1, 8, 8), 'heads': (4, 2)},
    'causal_sinks_one_block': {'tile': (3, 21, 21), 'heads': (4, 4), 'sinks': True},
    'window_cap': {'mask': {'window': 5}, 'tile': (1, 4, 8), 'heads': (6, 2), 'soft_cap': 1.5},
    'chunk_sinks': {'mask': {'chunk': 4}, 'tile': (2, 8, 5), 'heads': (3, 1), 'sinks': True},
    'both_ways_cap': {'mask': {'causal': False}, 'tile': (3, 5, 4), 'heads': (2, 2), 'soft_cap': 2.0},
    'both_ways_window': {'mask': {'causal': False, 'window': 3}, 'tile': (1, 21, 4), 'heads': (4, 1)},
    'window_of_one': {'mask': {'window': 1}, 'tile': (1, 8, 16), 'heads': (2, 1), 'sinks': True, 'dtype': 'float32'},
    'chunk_window_cap': {
        'mask': {'chunk': 7, 'window': 4},
        'tile': (1, 6, 6),
        'heads': (4, 2),
        'soft_cap': 3.0,
        'dtype': 'float32',
    },
    'bfloat16': {'tile': (1, 8, 8), 'heads': (4, 2), 'sinks': True, 'dtype': 'bfloat16'},
}


def drawn(case):
    """Operands (q, k, v, sinks), their cotangent and places of one case; row 1 is nothing but padding."""
    rng = np.random.default_rng(7)
    positions, segments = packed_places(rng, B, T, segments=3, padding=2)
    segments[1] = 0
    (N, K), dtype = case['heads'], jnp.dtype(case.get('dtype', 'float64'))
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, Hv), (B, T, N, Hv))
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    sinks = rng.standard_normal(N).astype(dtype) if case.get('sinks') else None
    return (q, k, v, sinks), dout, Places(positions, positions, segments, segments)


def options_of(case):
    return Options(Scores(Mask(**case.get('mask', {})), SCALE, case.get('soft_cap')), tile=Tile(*case['tile']))


@pytest.fixture(scope='module')
def results():
    """Outputs and gradients of all cases, from one program."""

    @jax.jit
    def run(operands):
        found = {}
        for name, (arrays, dout, places) in operands.items():
            attend = partial(parallel_attention, options_of(CASES[name]))
            out, pull = jax.vjp(lambda *args, attend=attend, places=places: attend(*args, places), *arrays)
            found[name] = out, pull(dout)
        return found

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run({name: drawn(case) for name, case in CASES.items()}))


def assert_close(found, expected, tolerance):
    """Relative error by the norm of each tensor."""
    for name, ours, theirs in zip(('out', 'dq', 'dk', 'dv', 'dsinks'), found, expected, strict=False):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, f'{name}: relative error {error:.1e} against numpy'


@pytest.mark.parametrize('name', CASES)
def test_output_and_gradients_equal_numpy(name, results):
    case = CASES[name]
    (q, k, v, sinks), dout, places = drawn(case)
    out, grads = results[name]
    mask = case.get('mask', {})
    expected, gradients = attention_and_gradients(q, k, v, dout, places, SCALE, case.get('soft_cap'), sinks, **mask)
    count = 3 if sinks is None else 4
    assert {x.dtype for x in (out, *grads[:count])} == {q.dtype}
    assert_close([out, *grads[:count]], [expected, *gradients[:count]], TOLERANCE[q.dtype.name])
    assert np.all(out[places.q_segments == 0] == 0), 'padding must attend to nothing'


def test_numpy_gradients_are_finite_differences():
    """The yardstick itself: one number of each operand, by central differences in float64."""
    rng = np.random.default_rng(3)
    positions, segments = packed_places(rng, 1, 7, segments=2, padding=1)
    places = (positions, positions, segments, segments)
    operands = [rng.standard_normal(shape) for shape in ((1, 7, 4, 3), (1, 7, 2, 3), (1, 7, 2, 2), (4,))]
    dout = rng.standard_normal((1, 7, 4, 2))

    def value(q, k, v, sinks):
        out, _ = attention_and_gradients(q, k, v, dout, places, 0.7, 1.3, sinks, window=3)
        return (out * dout).sum()

    q, k, v, sinks = operands
    _, gradients = attention_and_gradients(q, k, v, dout, places, 0.7, 1.3, sinks, window=3)
    for index, gradient in enumerate(gradients):
        at = (*(int(rng.integers(0, size)) for size in gradient.shape[:-1]), 1)

        def moved(by, index=index, at=at):
            there = [x.copy() for x in operands]
            there[index][at] += by
            return value(*there)

        up, down = moved(1e-6), moved(-1e-6)
        assert gradient[at] == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-9)


def test_blocks_that_no_query_sees_are_not_touched():
    """Values there are NaN: a masked product with them would be NaN too."""
    length, block = 32, 8
    positions = np.tile(np.arange(16, dtype=np.int32), 2)[None]
    segments = np.repeat([1, 2], 16).astype(np.int32)[None]
    places = Places(positions, positions, segments, segments)
    options = Options(Scores(Mask(), 1.0), tile=Tile(1, block, block))
    ones = np.ones((1, length, 1, 4), np.float32)
    run = jax.jit(lambda v: parallel_attention(options, ones, ones, v, None, places))
    behind, before = ones.copy(), ones.copy()
    behind[:, 8:] = np.nan  # behind the first block of queries, and another document
    out = np.asarray(run(behind))
    np.testing.assert_allclose(out[0, :8], 1, rtol=1e-6)
    assert np.isnan(out[0, 8:]).all()
    before[:, :16] = np.nan  # the second document never reads the first
    np.testing.assert_allclose(np.asarray(run(before))[0, 16:], 1, rtol=1e-6)


def sizes_in(jaxpr):
    """Number of elements of every array in a jaxpr, those inside loops and branches too."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield int(np.prod(getattr(var.aval, 'shape', ())))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from sizes_in(inner)


def operations_in(jaxpr):
    """Names of the operations of a jaxpr, those inside loops and branches too."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from operations_in(inner)


def test_a_remat_policy_can_keep_what_the_backward_needs():
    """Two loops over tiles, forward and backward; a third where the forward has to run again."""
    places = Places(*[np.ones((B, T), np.int32)] * 4)
    options = Options(Scores(Mask(), SCALE))

    def loops(policy):
        @partial(jax.checkpoint, policy=policy)
        def layer(q):
            return parallel_attention(options, q, q, q, None, places)

        q = jax.ShapeDtypeStruct((B, T, 2, H), jnp.float32)
        jaxpr = jax.make_jaxpr(jax.grad(lambda q: layer(q).sum()))(q)
        return list(operations_in(jaxpr.jaxpr)).count('scan')

    assert loops(jax.checkpoint_policies.nothing_saveable) == 3
    assert loops(jax.checkpoint_policies.save_only_these_names('attention')) == 2


def test_no_array_of_all_pairs_at_32k():
    """Walks the program of loss and gradients at 32,768 tokens without running it."""
    length, heads = 32768, 2
    array = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, positions, segments, implementation):
        places = {
            'q_positions_BT': positions,
            'k_positions_BS': positions,
            'q_segments_BT': segments,
            'k_segments_BS': segments,
        }
        return attention(q, k, v, **places, scale=1.0, soft_cap=30.0, implementation=implementation).sum()

    def largest(implementation):
        grad = jax.value_and_grad(lambda *args: loss(*args, implementation), argnums=(0, 1, 2))
        return max(sizes_in(jax.make_jaxpr(grad)(array, array, array, place, place).jaxpr))

    assert largest('dense') >= heads * length * length, 'the walk must see what it looks for'
    assert largest('auto') <= 4 * array.size, 'nothing may be larger than a few times the operands'
