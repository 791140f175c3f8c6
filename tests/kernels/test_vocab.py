"""Embedding lookup, whole and cut over meshes, against numpy indexing and numpy's own scatter-add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.vocab import embed_lookup

V, D, B, T = 24, 8, 4, 6
MESHES = {
    'none': {},
    'tensor': {'tensor': 4},
    'rows_and_fsdp': {'pipe': 2, 'fsdp': 2, 'tensor': 2},
    'context': {'data': 2, 'context': 2, 'tensor': 2},
}


def draw():
    rng = np.random.default_rng(5)
    ids = rng.integers(0, V, (B, T), dtype=np.int32)
    ids[0, :4] = 7  # the same row many times
    return rng.standard_normal((V, D)), ids, rng.standard_normal((B, T, D))


def expected_gradient(ids, dout, rows=V):
    gradient = np.zeros((rows, dout.shape[-1]))
    np.add.at(gradient, ids, dout)
    return gradient


def lookup_and_gradient(table, ids, dout):
    out, pull = jax.vjp(lambda table: embed_lookup(table, ids), table)
    return out, pull(dout)[0]


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize('name', MESHES)
def test_rows_and_gradient_on_meshes(name):
    table, ids, dout = draw()
    run = jax.jit(lookup_and_gradient)
    with jax.enable_x64(True):
        if MESHES[name]:
            with jax.set_mesh(mesh_of(MESHES[name])):
                out, gradient = run(table, ids, dout)
        else:
            out, gradient = run(table, ids, dout)
    np.testing.assert_array_equal(out, table[ids])
    np.testing.assert_allclose(gradient, expected_gradient(ids, dout), rtol=0, atol=1e-14)


def test_inside_a_shard_map_over_pipe():
    """As a pipeline runs it: the table's rows are divided outside, ids and cotangent are equal on all stages."""
    table, ids, dout = draw()
    with jax.enable_x64(True), jax.set_mesh(mesh_of({'pipe': 4, 'tensor': 2})):
        run = jax.shard_map(
            lookup_and_gradient,
            in_specs=(P('pipe'), P(), P()),
            out_specs=(P(), P('pipe')),
            axis_names={'pipe'},
            check_vma=False,
        )
        out, gradient = jax.jit(run)(table, ids, dout)
    np.testing.assert_array_equal(out, table[ids])
    np.testing.assert_allclose(gradient, expected_gradient(ids, dout), rtol=0, atol=1e-14)


def test_bfloat16_gradient_is_added_up_in_float32():
    """1,001 ones: a bfloat16 sum would stop at 256, where adding 1 no longer changes it."""
    table = np.zeros((4, 2), jnp.bfloat16)
    ids = np.full((1, 1001), 2, np.int32)
    out, gradient = map(np.asarray, jax.jit(lookup_and_gradient)(table, ids, np.ones((1, 1001, 2), jnp.bfloat16)))
    assert out.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(np.float64)[2], np.float64(jnp.bfloat16(1001)))


def test_ids_outside_the_table_give_zeros_and_no_gradient():
    table, _, _ = draw()
    ids = np.array([[-1, 0, V, V + 5]], np.int32)
    dout = np.ones((1, 4, D))
    with jax.enable_x64(True):
        out, gradient = map(np.asarray, jax.jit(lookup_and_gradient)(table, ids, dout))
    np.testing.assert_array_equal(out[0], [np.zeros(D), table[0], np.zeros(D), np.zeros(D)])
    np.testing.assert_array_equal(gradient, expected_gradient(ids[:, 1:2], dout[:, 1:2]))


def test_rows_must_divide():
    mesh = jax.sharding.AbstractMesh((2, 4), ('pipe', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match='a table of 50257 rows does not divide over pipe=2 x tensor=4: pad it'),
    ):
        jax.eval_shape(
            embed_lookup, jax.ShapeDtypeStruct((50257, 8), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
        )
