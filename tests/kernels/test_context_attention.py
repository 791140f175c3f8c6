"""Attention on meshes of eight virtual devices equals float64 numpy, gradients included."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy_attention import attention_and_gradients, packed_places

from jpt.kernels.blockwise_attention import Scores, Tile
from jpt.kernels.masks import Mask, Places
from jpt.kernels.parallel_attention import Options, parallel_attention

B, T, H, SCALE = 4, 24, 4, 0.5
NAMES = ('out', 'dq', 'dk', 'dv', 'dsinks')

# mesh, query and kv heads, how keys travel, mask, sinks
CASES = {
    'ring': ({'context': 4}, (4, 2), 'ring', {}, True),
    'ring_rows_heads': ({'fsdp': 2, 'context': 2, 'tensor': 2}, (6, 3), 'ring', {'window': 7}, True),
    'gather_heads': ({'context': 4, 'tensor': 2}, (4, 2), 'gather', {'chunk': 5}, False),
    'three_kv_heads': ({'data': 2, 'tensor': 2}, (12, 3), 'ring', {}, True),
    'fewer_kv_heads': ({'data': 2, 'tensor': 4}, (8, 2), 'ring', {'causal': False}, False),
}


def operands(N, K, sinks):
    rng = np.random.default_rng(11)
    positions, segments = packed_places(rng, B, T, segments=3, padding=3)
    q, k, v, dout = (rng.standard_normal((B, T, heads, H)) for heads in (N, K, K, N))
    return (q, k, v, rng.standard_normal(N) if sinks else None), dout, (positions, positions, segments, segments)


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def assert_equal_to_numpy(found, arrays, dout, places, mask):
    q, k, v, sinks = arrays
    out, gradients = attention_and_gradients(q, k, v, dout, places, SCALE, sinks=sinks, **mask)
    for name, ours, theirs in zip(NAMES, found, [out, *gradients], strict=False):
        if ours is not None:
            error = np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)
            assert error < 1e-12, f'{name}: relative error {error:.1e} against numpy'


@pytest.mark.parametrize('name', CASES)
def test_automatic_axes(name):
    sizes, (N, K), context, mask, with_sinks = CASES[name]
    arrays, dout, places = operands(N, K, with_sinks)
    options = Options(Scores(Mask(**mask), SCALE), context, Tile(1, 5, 4))

    @jax.jit
    def run(arrays, dout, places):
        out, pull = jax.vjp(lambda *args: parallel_attention(options, *args, Places(*places)), *arrays)
        return out, *pull(dout)

    with jax.enable_x64(True), jax.set_mesh(mesh_of(sizes)):
        found = run(arrays, dout, places)
    assert_equal_to_numpy(found, arrays, dout, places, mask)


@pytest.mark.parametrize('context', ['ring', 'gather'])
def test_inside_a_shard_map_over_context(context):
    """As the training step runs it: gradients are taken inside, and what is equal everywhere is summed there."""
    arrays, dout, places = operands(4, 2, sinks=True)
    options = Options(Scores(Mask(), SCALE), context, Tile(1, 4, 4))
    cut = P(None, 'context')

    def inside(arrays, dout, places):
        out, pull = jax.vjp(lambda *args: parallel_attention(options, *args, Places(*places)), *arrays)
        dq, dk, dv, dsinks = pull(dout)
        return out, dq, dk, dv, jax.lax.psum(dsinks, 'context')

    with jax.enable_x64(True), jax.set_mesh(mesh_of({'context': 4, 'tensor': 2})):
        specs = ((cut, cut, cut, P()), cut, cut)
        run = jax.shard_map(
            inside,
            in_specs=specs,
            out_specs=(cut, cut, cut, cut, P()),
            axis_names={'context'},
            check_vma=False,
        )
        found = jax.jit(run)(arrays, dout, places)
    assert_equal_to_numpy(found, arrays, dout, places, {})
