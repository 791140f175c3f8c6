"""The state-space scan against the plain recurrence in float64: packing, padding, chunks, steps, meshes, memory."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpy_ssd as reference
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.ssd import SsdState, init_state, ssd, ssd_step

# Ragged prompts: padding at the start and at the end, documents of one token, a row without padding.
SEGMENTS = np.stack([reference.places([7, 1, 4], 3, 4), reference.places([10, 9]), reference.places([2, 9], 0, 8)])
NAMES = ('dx', 'ddt', 'da', 'db', 'dc')


def operands(segments=SEGMENTS, heads=4, groups=2, width=3, size=5, rate=1.0, seed=0):
    """x, dt, a, b, c and the cotangents of y and of the last state."""
    rng = np.random.default_rng(seed)
    rows = segments.shape
    shapes = (*rows, heads, width), (*rows, heads), (heads,), (*rows, groups, size), (*rows, groups, size)
    x, dt, a, b, c = (rng.standard_normal(shape) for shape in shapes)
    cotangents = rng.standard_normal(x.shape), rng.standard_normal((rows[0], heads, width, size))
    return (x, np.logaddexp(0, dt), -rate * np.exp(a), b, c), cotangents


def poisoned(arrays, segments=SEGMENTS):
    """The same with NaN wherever there is padding; arrays without tokens as they are."""
    padding = segments == 0

    def poison(v):
        return np.where(padding.reshape(*padding.shape, *[1] * (v.ndim - 2)), np.nan, v).astype(v.dtype)

    return tuple(poison(v) if v.shape[:2] == padding.shape else v for v in arrays)


def differentiated(segments, chunk=None):
    """(arrays, cotangents) -> y, last state, last segments, gradients."""

    def run(arrays, cotangents):
        def outputs(*arrays):
            y, state = ssd(*arrays, segments, chunk=chunk)
            return (y, state.state_BNPZ), state.segment_B

        (y, state), pull, ids = jax.vjp(outputs, *arrays, has_aux=True)
        return y, state, ids, pull(cotangents)

    return run


def relative(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def assert_equal_to_numpy(found, arrays, cotangents, segments, tolerance, what=''):
    y, state, ids = reference.ssd(*arrays, segments)
    gradients = reference.ssd_gradients(*arrays, segments, *cotangents)
    np.testing.assert_array_equal(found[2], ids)
    pairs = {'y': (found[0], y), 'state': (found[1], state)}
    pairs |= {name: pair for name, *pair in zip(NAMES, found[3], gradients, strict=True)}
    for name, (ours, theirs) in pairs.items():
        assert relative(ours, theirs) < tolerance, f'{what} {name}: {relative(ours, theirs):.1e} from numpy'
    assert not np.asarray(found[0])[segments == 0].any(), 'outputs at padding must be 0'


def test_value_and_gradients_do_not_depend_on_chunks():
    """NaN stands in all padding, cotangents included."""
    arrays, cotangents = operands()
    chunks = (1, 7, None)

    @jax.jit
    def run(*args):
        return {chunk or 0: differentiated(SEGMENTS, chunk)(*args) for chunk in chunks}

    with jax.enable_x64(True):
        found = run(poisoned(arrays), poisoned(cotangents))
    for chunk, values in found.items():
        assert_equal_to_numpy(values, arrays, cotangents, SEGMENTS, 1e-12, f'chunk {chunk}')


def test_a_packed_document_is_as_if_alone():
    arrays, _ = operands()
    alone = np.where(SEGMENTS == 2, SEGMENTS, 0)  # the second document of every row, all else taken for padding

    @jax.jit
    def run(segments):
        return ssd(*arrays, segments, chunk=4)[0]

    with jax.enable_x64(True):
        packed, apart = run(SEGMENTS), run(alone)
    assert np.abs(apart).max() > 0.1
    np.testing.assert_allclose(np.asarray(packed)[alone == 2], np.asarray(apart)[alone == 2], rtol=0, atol=1e-13)


def test_steps_and_pieces_equal_the_whole():
    """Decoding token by token, and prompts read in two pieces, the second cut within documents and padding."""
    arrays, _ = operands()
    x, dt, a, b, c = poisoned(arrays)

    @jax.jit
    def run(x, dt, b, c):
        def step(state, cut):
            y, state = ssd_step(*cut[:2], a, *cut[2:], state)
            return state, y

        start = init_state(*x.shape[:1], *x.shape[2:], b.shape[-1], x.dtype)
        by_time = (v.swapaxes(0, 1) for v in (x, dt, b, c, jnp.asarray(SEGMENTS)))
        state, y = jax.lax.scan(step, start, tuple(by_time))
        found = {'steps': (y.swapaxes(0, 1), state)}
        for cuts in ((0, 9, 19), (0, 2, 16, 17, 19)):
            state, parts = None, []
            for i, j in pairwise(cuts):
                pieces = (v[:, i:j] for v in (b, c, SEGMENTS))
                part, state = ssd(x[:, i:j], dt[:, i:j], a, *pieces, state, chunk=4)
                parts.append(part)
            found[f'pieces {cuts}'] = jnp.concatenate(parts, axis=1), state
        return found

    with jax.enable_x64(True):
        found = run(x, dt, b, c)
    y, last, ids = reference.ssd(*arrays, SEGMENTS)
    for name, (ours, state) in found.items():
        assert relative(ours, y) < 1e-13, name
        assert relative(state.state_BNPZ, last) < 1e-13, name
        np.testing.assert_array_equal(state.segment_B, ids)


def test_a_state_goes_on_in_its_own_segment_only():
    """Row 0 goes on, row 1 is another document (the old state holds NaN), row 2 is padding."""
    segments = np.stack([reference.places([4, 2], 2), reference.places([5], 2, 1), np.zeros(8, np.int32)])
    arrays, (dy, dlast) = operands(segments)
    rng = np.random.default_rng(1)
    before, change = rng.standard_normal((2, 3, 4, 3, 5))
    ids = np.array([1, 7, 7], np.int32)
    broken = before.copy()
    broken[1] = np.nan

    @jax.jit
    def run(state):
        def outputs(state):
            y, after = ssd(*poisoned(arrays, segments), segments, SsdState(state, ids), chunk=3)
            return (y, after.state_BNPZ), after.segment_B

        values, pull, after = jax.vjp(outputs, state, has_aux=True)
        return *values, after, *pull((dy, dlast))

    with jax.enable_x64(True):
        y, state, after, gradient = run(broken)
    wanted = reference.ssd(*arrays, segments, before, ids)
    for ours, theirs in zip((y, state, after), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)
    # The outputs are linear in the state: a difference of any length is the derivative.
    moved = reference.ssd(*arrays, segments, before + change, ids)
    slope = np.sum((moved[0] - wanted[0]) * dy) + np.sum((moved[1] - wanted[1]) * dlast)
    assert np.sum(np.asarray(gradient) * change) == pytest.approx(slope, rel=1e-10)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 2e-6), ('bfloat16', 1.5e-2)])
def test_narrow_dtypes_and_strong_decay(dtype, tolerance):
    """Rates up to several hundred per step: logarithms of decays far beyond the range of exp."""
    arrays, cotangents = operands(rate=100.0)
    names = [dtype, 'float32', 'float32', dtype, dtype]
    arrays = [v.astype(jnp.dtype(name)) for v, name in zip(arrays, names, strict=True)]
    cotangents = cotangents[0].astype(jnp.dtype(dtype)), cotangents[1].astype(np.float32)
    arrays[2][:2] /= 1000  # two heads remember
    found = jax.jit(differentiated(SEGMENTS, 16))(arrays, cotangents)
    assert found[0].dtype == dtype
    assert found[1].dtype == np.float32
    assert [v.dtype for v in found[3]] == names
    wide = [np.asarray(v, np.float64) for v in (*arrays, *cotangents)]
    assert_equal_to_numpy(found, wide[:5], wide[5:], SEGMENTS, tolerance, dtype)


# Mesh, heads and groups: groups that divide, one for all, groups that a shard's heads cut through.
MESHES = {
    'divides': ({'data': 2, 'tensor': 2}, 4, 2),
    'one_group': ({'fsdp': 2, 'tensor': 4}, 4, 1),
    'three_groups': ({'data': 2, 'fsdp': 2, 'tensor': 2}, 12, 3),
}


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize('name', MESHES)
def test_meshes(name):
    sizes, heads, groups = MESHES[name]
    segments = np.concatenate([SEGMENTS, SEGMENTS[:1]])
    arrays, cotangents = operands(segments, heads, groups)
    rows = tuple(axis for axis in ('data', 'fsdp') if axis in sizes)
    mesh = mesh_of(sizes)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        x = NamedSharding(mesh, P(rows, None, 'tensor'))
        group = NamedSharding(mesh, P(rows, None, 'tensor' if groups % sizes['tensor'] == 0 else None))
        placed = jax.device_put(arrays, (x, x, NamedSharding(mesh, P('tensor')), group, group))
        state = NamedSharding(mesh, P(rows, 'tensor'))
        found = jax.jit(differentiated(segments, 5))(placed, jax.device_put(cotangents, (x, state)))
        assert found[1].sharding.is_equivalent_to(state, 4)
    assert_equal_to_numpy(found, arrays, cotangents, segments, 1e-12)


def test_memory_is_linear_in_length():
    """Nothing of size [T, T]: four times the tokens take at most four times the memory, compiled and not run."""

    def temporary(length):
        shapes = (1, length, 4, 8), (1, length, 4), (4,), (1, length, 1, 16), (1, length, 1, 16)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        cotangents = arrays[0], jax.ShapeDtypeStruct((1, 4, 8, 16), jnp.float32)
        program = jax.jit(differentiated(np.ones((1, length), np.int32), 32)).lower(arrays, cotangents).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(4096)
    assert long < 4.1 * short
    assert long < 4096 * 4 * (32 + 16) * 4 * 4, 'a few times the operands'


def narrow(arrays):
    return [v.astype(np.float32) for v in arrays]


def test_refusals():
    arrays = narrow(operands(heads=6)[0])
    with pytest.raises(ValueError, match=r'ssd: 6 heads do not divide into 4 groups'):
        ssd(*narrow(operands(heads=6, groups=4)[0]), SEGMENTS)
    with pytest.raises(ValueError, match=r'ssd: segments has shape \(2, 19\): expected \(3, 19\)'):
        ssd(*arrays, SEGMENTS[:2])
    with jax.set_mesh(mesh_of({'tensor': 4})), pytest.raises(ValueError, match='6 heads do not divide over tensor=4'):
        ssd(*arrays, SEGMENTS)
    with jax.set_mesh(mesh_of({'context': 2})), pytest.raises(ValueError, match='expected context=1'):
        ssd(*arrays, SEGMENTS)
