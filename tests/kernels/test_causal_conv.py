"""The causal convolution against a loop in float64: packing, padding, tails, meshes."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpy_ssd as reference
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.causal_conv import ConvTail, causal_conv, init_tail

WIDTH, CHANNELS = 4, 6
SEGMENTS = np.stack([reference.places([7, 1, 2], 3, 3), reference.places([9, 7]), reference.places([2, 4], 0, 10)])


def operands():
    rng = np.random.default_rng(0)
    shapes = (*SEGMENTS.shape, CHANNELS), (CHANNELS, WIDTH), (CHANNELS,), (*SEGMENTS.shape, CHANNELS)
    return [rng.standard_normal(shape) for shape in shapes]


def poisoned(x):
    return np.where(SEGMENTS[..., None] == 0, np.nan, x).astype(x.dtype)


def differentiated(x, kernel, bias, dy):
    y, pull = jax.vjp(lambda *args: causal_conv(*args, SEGMENTS)[0], x, kernel, bias)
    return y, *pull(dy)


def assert_equal_to_numpy(found, x, kernel, bias, dy, tolerance):
    wanted = reference.causal_conv(x, kernel, bias, SEGMENTS), *reference.causal_conv_gradients(x, kernel, SEGMENTS, dy)
    for name, ours, theirs in zip(('y', 'dx', 'dkernel', 'dbias'), found, wanted, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, f'{name}: relative error {error:.1e} against numpy'
    assert not np.asarray(found[0])[SEGMENTS == 0].any(), 'outputs at padding must be 0'


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float64', 1e-14), ('bfloat16', 5e-3)])
def test_value_and_gradients(dtype, tolerance):
    """NaN stands in all padding, that of the cotangent included."""
    x, kernel, bias, dy = (v.astype(jnp.dtype(dtype)) for v in operands())
    with jax.enable_x64(dtype == 'float64'):
        found = jax.jit(differentiated)(poisoned(x), kernel, bias, poisoned(dy))
    assert [v.dtype for v in found] == [dtype] * 4
    assert_equal_to_numpy(found, *(np.asarray(v, np.float64) for v in (x, kernel, bias, dy)), tolerance)


def test_steps_and_pieces_equal_the_whole():
    """Token by token, and in pieces that end within documents and padding, one of them shorter than the kernel."""
    x, kernel, bias, _ = operands()

    @jax.jit
    def run(x):
        def step(tail, cut):
            y, tail = causal_conv(cut[0][:, None], kernel, bias, cut[1][:, None], tail)
            return tail, y[:, 0]

        start = init_tail(len(x), WIDTH, CHANNELS, x.dtype)
        tail, y = jax.lax.scan(step, start, (x.swapaxes(0, 1), jnp.asarray(SEGMENTS.T)))
        found = {'steps': (y.swapaxes(0, 1), tail)}
        for cuts in ((0, 8, 16), (0, 2, 4, 5, 9, 16)):
            tail, parts = start, []
            for i, j in pairwise(cuts):
                part, tail = causal_conv(x[:, i:j], kernel, bias, SEGMENTS[:, i:j], tail)
                parts.append(part)
            found[f'{cuts}'] = jnp.concatenate(parts, axis=1), tail
        return found, causal_conv(x, kernel, bias, SEGMENTS)[1]

    with jax.enable_x64(True):
        found, whole = run(poisoned(x))
    wanted = reference.causal_conv(x, kernel, bias, SEGMENTS)
    last = np.stack([np.pad(x[0, 11:13], ((1, 0), (0, 0))), x[1, 13:16], x[2, 3:6]])
    np.testing.assert_array_equal(whole.inputs_BWC, last)
    for name, (y, tail) in found.items():
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-14, err_msg=name)
        np.testing.assert_array_equal(tail.inputs_BWC, last, err_msg=name)
        np.testing.assert_array_equal(tail.segment_B, [3, 2, 2], err_msg=name)


def test_a_tail_goes_on_in_its_own_segment_only():
    """Row 0 goes on after padding, row 1 is another document (the old tail holds NaN), row 2 is padding."""
    x, kernel, bias, _ = operands()
    segments = np.stack([reference.places([4], 2), reference.places([5], 1), np.zeros(6, np.int32)])
    old = np.random.default_rng(1).standard_normal((3, WIDTH - 1, CHANNELS))
    broken = old.copy()
    broken[1] = np.nan
    with jax.enable_x64(True):
        tail = ConvTail(jnp.asarray(broken), jnp.array([1, 7, 7], jnp.int32))
        y, after = jax.jit(causal_conv)(x[:, :6], kernel, bias, segments, tail)
    joined = np.concatenate([old[0], x[0, 2:6]])
    np.testing.assert_allclose(y[0, 2:], reference.causal_conv(joined[None], kernel, bias, np.ones((1, 7)))[0, 3:])
    np.testing.assert_allclose(y[1], reference.causal_conv(x[:, :6], kernel, bias, segments)[1])
    np.testing.assert_array_equal(after.inputs_BWC[:2], [x[0, 3:6], x[1, 3:6]])
    np.testing.assert_array_equal(after.inputs_BWC[2], old[2])
    np.testing.assert_array_equal(after.segment_B, [1, 1, 7])


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_mesh():
    x, kernel, bias, dy = operands()
    mesh = mesh_of({'tensor': 2})
    with jax.enable_x64(True), jax.set_mesh(mesh):
        specs = P(None, None, 'tensor'), P('tensor'), P('tensor'), P(None, None, 'tensor')
        placed = jax.device_put((x, kernel, bias, dy), tuple(NamedSharding(mesh, spec) for spec in specs))
        program = jax.jit(differentiated).lower(*placed).compile()
        found = program(*placed)
    assert_equal_to_numpy(found, x, kernel, bias, dy, 1e-14)
    assert 'all-' not in program.as_text(), 'channels are apart: nothing is to be sent'


def test_refusals():
    x, kernel, bias, _ = (v.astype(np.float32) for v in operands())
    with pytest.raises(ValueError, match=r'kernel \(6, 4\), bias \(5,\): expected \(6, 2 or more\) and \(6,\)'):
        causal_conv(x, kernel, bias[:5], SEGMENTS)
    with pytest.raises(ValueError, match=r'tail \(3, 2, 6\): expected \(3, 3, 6\)'):
        causal_conv(x, kernel, bias, SEGMENTS, init_tail(3, 3, CHANNELS, x.dtype))
    with (
        jax.set_mesh(mesh_of({'context': 2})),
        pytest.raises(ValueError, match='mesh has context > 1'),
    ):
        causal_conv(x, kernel, bias, SEGMENTS)
