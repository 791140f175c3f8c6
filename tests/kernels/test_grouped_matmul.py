"""Grouped products against loops over the groups in float64, on every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.grouped_matmul import PRODUCT, choose_tile, grouped_matmul, refusal
from jpt.kernels.local import local

HERE = ('tiles', 'ragged', 'dense')
# sizes: rows that belong to no group, groups without rows at both ends and inside, one group with all, one group, none.
CASES = {
    'ragged': [0, 13, 0, 0, 30, 1, 7, 0],
    'rows beyond': [3, 0, 20, 5],
    'all in one': [0, 0, 51, 0],
    'one group': [51],
    'nothing': [0, 0, 0],
}
ROWS, K, O = 51, 36, 20


def expected(x, kernels, sizes, dy):
    """y, dx and dkernels, group by group."""
    y, dx = np.zeros_like(dy), np.zeros_like(x)
    dkernels, start = np.zeros_like(kernels), 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        y[own] = x[own] @ kernels[group].T
        dx[own] = dy[own] @ kernels[group]
        dkernels[group] = dy[own].T @ x[own]
        start += size
    return y, dx, dkernels


def operands(sizes, rows=ROWS, k=K, o=O, seed=0):
    """x, kernels and dy in float64, with NaN in the rows of x and dy that belong to no group."""
    random = np.random.default_rng(seed)
    x, kernels, dy = (random.standard_normal(shape) for shape in ((rows, k), (len(sizes), o, k), (rows, o)))
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return x, kernels, dy


def both_ways(implementation):
    @jax.jit
    def run(x, kernels, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, kernels)
        return y, *pull(dy)

    return run


def close(found, wanted, tolerance):
    for name, a, b in zip(('y', 'dx', 'dkernels'), found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize('implementation', HERE)
@pytest.mark.parametrize('case', CASES)
def test_value_and_gradients(case, implementation):
    sizes = np.array(CASES[case], np.int32)
    x, kernels, dy = operands(sizes)
    arrays = [np.float32(array) for array in (x, kernels)]
    close(both_ways(implementation)(*arrays, sizes, np.float32(dy)), expected(x, kernels, sizes, dy), 2e-5)


@pytest.mark.parametrize('rows', [8, 300, 2048])
def test_tiles_of_every_length(rows):
    """Groups shorter and longer than a tile: 4 rows, as when decoding, up to 128."""
    sizes = np.array([rows // 2, 0, rows // 8, 1, rows // 4], np.int32)
    assert choose_tile(rows, len(sizes)) == {8: 4, 300: 32, 2048: 128}[rows]
    x, kernels, dy = operands(sizes, rows)
    arrays = [np.float32(array) for array in (x, kernels)]
    close(both_ways('auto')(*arrays, sizes, np.float32(dy)), expected(x, kernels, sizes, dy), 3e-4)


@pytest.mark.parametrize('implementation', HERE)
def test_a_float64_run_stays_float64(implementation):
    sizes = np.array(CASES['rows beyond'], np.int32)
    x, kernels, dy = operands(sizes)
    with jax.enable_x64(True):
        close(both_ways(implementation)(x, kernels, sizes, dy), expected(x, kernels, sizes, dy), 1e-12)


@pytest.mark.parametrize('implementation', HERE)
def test_the_kernels_gradient_adds_up_in_float32(implementation):
    """4,096 ones: a sum in bfloat16 sticks at 256, and one rounded between tiles cannot hold 4,096 + 8."""
    sizes = np.array([4104, 0], np.int32)
    x, kernels = jnp.ones((4104, 8), jnp.bfloat16), jnp.ones((2, 8, 8), jnp.float32)
    y, dx, dkernels = both_ways(implementation)(x, kernels, sizes, jnp.ones((4104, 8), jnp.bfloat16))
    assert (y.dtype, dx.dtype, dkernels.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(dkernels, np.stack([np.full((8, 8), 4104), np.zeros((8, 8))]))


def test_bfloat16_rounds_the_result_once():
    sizes = np.array(CASES['rows beyond'], np.int32)
    x, kernels, dy = (np.asarray(array, jnp.bfloat16) for array in operands(sizes))
    wide = [np.asarray(array, np.float64) for array in (x, kernels)]
    wanted = expected(*wide, sizes, np.asarray(dy, np.float64))
    for a, b in zip(both_ways('tiles')(x, kernels, sizes, dy), wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-4)


def test_bfloat16_stays_bfloat16_in_the_loop():
    """Neither all rows nor all kernels are made wide or copied: on CPU XLA does so with what a loop cuts."""
    sizes, rows = jnp.array([3, 0, 20, 5] * 4, jnp.int32), 112
    x, kernels = jnp.ones((rows, 32), jnp.bfloat16), jnp.ones((16, 96, 32), jnp.bfloat16)
    compiled = jax.jit(grouped_matmul).lower(x, kernels, sizes).compile()
    padded = rows + choose_tile(rows, 16)
    for shape in (f'[{padded},32]', f'[{padded},96]', '[16,96,32]'):
        assert f'f32{shape}' not in compiled.as_text(), shape
    both = padded * (32 + 96) * 2
    assert both <= compiled.memory_analysis().temp_size_in_bytes < both + kernels.nbytes // 2


def test_under_scan_and_checkpoint():
    """Three layers, each of them remade in the backward pass, against three products by hand."""
    sizes = np.array([4, 0, 9, 2], np.int32)
    x, kernels, _ = operands(sizes, rows=16, k=12, o=12)
    x[15:] = 0  # through tanh a NaN would come back as NaN: what lies there is the caller's here
    stacked = np.stack([kernels, 0.5 * kernels, -kernels])

    @jax.jit
    @jax.value_and_grad
    def total(stacked, x):
        layer = jax.checkpoint(lambda x, w: jnp.tanh(grouped_matmul(x, w, sizes)))
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, stacked)[0].sum()

    value, gradient = total(np.float32(stacked), np.float32(x))
    kept = [x]
    for kernel in stacked:
        kept.append(np.tanh(expected(kept[-1], kernel, sizes, np.zeros_like(x))[0]))
    down, wanted = np.ones_like(x), []
    for kernel, inner, outer in zip(stacked[::-1], kept[-2::-1], kept[:0:-1], strict=True):
        _, down, dkernels = expected(inner, kernel, sizes, down * (1 - outer**2))
        wanted.insert(0, dkernels)
    np.testing.assert_allclose(value, kept[-1].sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.stack(wanted), atol=1e-5)


def test_a_remat_policy_can_keep_the_result():
    """Forward, and two products backward: kept by its name, the first one is not made again."""
    sizes, x, kernels = jnp.array([3, 5]), jnp.ones((8, 4)), jnp.ones((2, 4, 4))

    def products(policy):
        def tanh(x, w):
            return jnp.tanh(grouped_matmul(x, w, sizes, implementation='ragged'))

        layer = jax.checkpoint(tanh, policy=policy)
        program = jax.make_jaxpr(jax.grad(lambda x, w: layer(x, w).sum(), (0, 1)))(x, kernels)
        return str(program).count('ragged_dot_general[')

    assert products(jax.checkpoint_policies.save_only_these_names(PRODUCT)) == 3
    assert products(jax.checkpoint_policies.nothing_saveable) == 4


def test_on_the_shards_of_a_mesh():
    """Each of eight devices has its own rows, sizes and kernels, as experts over an axis have them."""
    mesh = jax.make_mesh((4, 2), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)
    random = np.random.default_rng(1)
    sizes = random.multinomial(10, np.ones(4) / 4, size=8).astype(np.int32)
    shards = [operands(size, rows=12, seed=seed) for seed, size in enumerate(sizes)]
    wanted = [expected(x, kernels, size, dy) for (x, kernels, dy), size in zip(shards, sizes, strict=True)]
    x, kernels, dy = (np.concatenate([np.float32(shard[at]) for shard in shards]) for at in range(3))
    cut = P(('data', 'expert'))
    with jax.set_mesh(mesh):
        run = jax.jit(local(both_ways('auto'), (cut,) * 4, (cut,) * 3, ['data', 'expert']))
        found = run(x, kernels, sizes.reshape(-1), dy)
    close(found, [np.concatenate(arrays) for arrays in zip(*wanted, strict=True)], 2e-5)


def test_what_is_refused_is_named():
    x, kernels, sizes = jnp.ones((8, 4)), jnp.ones((2, 3, 4)), jnp.array([3, 5])
    with pytest.raises(ValueError, match="implementation='tile': expected one of auto, tiles"):
        grouped_matmul(x, kernels, sizes, implementation='tile')
    with pytest.raises(ValueError, match=r'expected \[M, K\], \[E, O, K\] and \[E\]'):
        grouped_matmul(x, kernels.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match='cannot be used: the platform is cpu, not gpu'):
        grouped_matmul(x, kernels, sizes, implementation='mosaic')


def test_mosaic_serves_half_precision_on_hopper_only():
    from jax.sharding import AbstractDevice, AbstractMesh

    def reason(kind, dtype, o=128):
        device = AbstractDevice(device_kind=kind, num_cores=132, platform='gpu')
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return refusal(jax.ShapeDtypeStruct((8, 64), dtype), jax.ShapeDtypeStruct((2, o, 64), jnp.float32))

    assert reason('NVIDIA H100 80GB HBM3', jnp.bfloat16) is None
    assert 'not of the Hopper generation' in reason('NVIDIA B200', jnp.bfloat16)
    assert 'float32, not bfloat16' in reason('NVIDIA H200', jnp.float32)
    assert 'multiples of 64' in reason('NVIDIA H200', jnp.bfloat16, 96)


def interpreted(name, *args, **options):
    """Runs one of the Mosaic kernels in the interpreter, with races looked for."""
    plgpu = pytest.importorskip('jax.experimental.pallas.mosaic_gpu')  # in jax 0.10 it needs absl
    if not hasattr(plgpu, 'InterpretGPUParams'):
        pytest.skip(f'the GPU interpreter of jax {jax.__version__} knows no transposed views and layouts: 0.11 does')
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    from jpt.kernels import mosaic_grouped

    found = getattr(mosaic_grouped, name)(*args, interpret=plgpu.InterpretGPUParams(detect_races=True), **options)
    assert not get_races().races_found
    return np.asarray(found, np.float64)


# Two blocks: a run of rows that four groups share, a whole run, rows of nobody; and few rows, the last columns outside.
MOSAIC = [(300, 128, 256, [70, 0, 1, 200, 0, 20]), (20, 64, 192, [0, 5, 0, 9])]


@pytest.mark.parametrize(('rows', 'k', 'o', 'sizes'), MOSAIC)
@pytest.mark.parametrize('out_first', [True, False])
def test_mosaic_rows(rows, k, o, sizes, out_first):
    x, kernels, dy = (np.asarray(array, jnp.bfloat16) for array in operands(sizes, rows, k, o))
    wide = [np.asarray(array, np.float64) for array in (x, kernels)]
    y, dx, _ = expected(*wide, sizes, np.asarray(dy, np.float64))
    left = x if out_first else dy
    found = interpreted('rows_product', left, kernels, jnp.array(sizes, jnp.int32), out_first=out_first)
    np.testing.assert_allclose(found, y if out_first else dx, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(('rows', 'k', 'o', 'sizes'), MOSAIC)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_mosaic_groups(rows, k, o, sizes, dtype):
    x, kernels, dy = (np.asarray(array, jnp.bfloat16) for array in operands(sizes, rows, k, o))
    wide = [np.asarray(array, np.float64) for array in (x, kernels)]
    wanted = expected(*wide, sizes, np.asarray(dy, np.float64))[2]
    found = interpreted('group_product', dy, x, jnp.array(sizes, jnp.int32), dtype=dtype)
    np.testing.assert_allclose(found, wanted, rtol=2**-8 if dtype == jnp.bfloat16 else 0, atol=1e-4)
