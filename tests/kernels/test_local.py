"""The helper that opens local shards: over which axes, with which specs, and what the collectives do without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size, axis_index, axis_size, local, manual, platform, pmax, pmin, psum

AXES = ('pipe', 'data', 'tensor')


def mesh():
    return jax.make_mesh((2, 1, 4), AXES, axis_types=(AxisType.Auto,) * 3)


def test_everything_is_the_identity_without_a_mesh():
    def double(x):
        return 2 * x

    assert local(double, P('tensor'), P('tensor'), AXES) is double
    x = np.arange(3.0)
    assert psum(x, AXES) is x
    assert pmax(x, AXES) is x
    assert pmin(x, AXES) is x
    assert (auto(AXES), manual(AXES), auto_size(AXES), axis_size(AXES)) == ((), (), 1, 1)
    assert int(axis_index(AXES)) == 0
    assert platform() == 'cpu'


def test_axes_of_size_one_are_left_out_and_absent_ones_dropped():
    with jax.set_mesh(mesh()):
        assert auto(('tensor', 'data', 'context', 'pipe')) == ('tensor', 'pipe')
        assert auto_size(['data', 'tensor', 'context']) == 4
        assert local(len, P(), P(), ['data', 'context']) is len


def test_shards_are_numbered_as_the_array_is_cut():
    """Rows over (pipe, tensor): the index is that of the block of rows, the first axis varying slowest."""

    def shard(x):
        assert x.shape == (2, 3)
        assert manual(AXES) == ('pipe', 'tensor')
        assert axis_size(['pipe', 'tensor']) == 8
        assert axis_size(['tensor']) == 4
        first = 2 * axis_index(['pipe', 'tensor'])
        sums = psum({'all': x[0, 0]}, ['pipe', 'tensor'])['all'], psum(x[0, 0], ['tensor'])
        return x[:, 0] - first, jnp.stack([*sums, pmax(x[0, 0], AXES), pmin(x[0, 0], AXES)])[None]

    rows = P(('pipe', 'tensor'))
    x = np.tile(np.arange(16.0, dtype=np.float32)[:, None], (1, 3))
    with jax.set_mesh(mesh()):
        run = jax.jit(local(shard, (P(('pipe', 'data', 'tensor'), 'context'),), (rows, rows), AXES))
        offsets, sums = map(np.asarray, run(x))
    np.testing.assert_array_equal(offsets, np.tile([0, 1], 8))
    # The first rows of the shards are 0, 2, ..., 14; those of the first pipe index 0, 2, 4, 6.
    np.testing.assert_array_equal(sums[0], [56, 12, 14, 0])
    np.testing.assert_array_equal(sums[7], [56, 44, 14, 0])


def test_nested_in_an_outer_shard_map_only_the_rest_is_opened():
    def inner(x):
        assert manual(AXES) == ('pipe', 'tensor')
        return psum(x, ['tensor'])

    def outer(x):
        assert manual(AXES) == ('pipe',)
        assert auto(AXES) == ('tensor',)
        return local(inner, P(('pipe', 'tensor')), P('pipe'), AXES)(x)

    with jax.set_mesh(mesh()):
        run = jax.shard_map(outer, in_specs=P('pipe'), out_specs=P('pipe'), axis_names={'pipe'}, check_vma=False)
        result = jax.jit(run)(np.arange(8, dtype=np.int32))
    np.testing.assert_array_equal(result, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])
