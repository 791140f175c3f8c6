"""Quantized rows against numpy's own divisions and roundings, and against what the fused forms are made of."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jpt.kernels.block_quantize import quantize_gated, quantize_normed, quantize_rows, refusal
from jpt.kernels.low_precision import exact_divide

E4M3 = ml_dtypes.float8_e4m3fn


def drawn(shape, dtype, seed=0):
    """Numbers of very different sizes, with a run of zeros, one of tiny numbers, one whose scale would be too small."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) * 10.0 ** random.integers(-4, 4, (*shape[:-1], 1))
    x[..., 0, :128] = 0
    if dtype != np.float16:
        x[..., 1, :128] *= 1e-30
        x[..., 2, :128] = 1e-36
    return x.astype(dtype)


def expected(x, columns, scale):
    """Codes and scales by numpy: float32 quotients, which IEEE 754 rounds once, and ml_dtypes' own E4M3."""
    *lead, K = x.shape
    blocks = -(-K // columns)
    wide = np.zeros((*lead, blocks * columns), np.float32)
    wide[..., :K] = x
    wide = wide.reshape(*lead, blocks, columns)
    scales = np.abs(wide).max(-1) / np.float32(448)
    if scale == 'power_of_two':
        fraction, exponent = np.frexp(scales)
        scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32) * (scales > 0)
    scales[scales < 2.0**-126] = 1
    codes = np.clip(wide / scales[..., None], -448, 448).astype(E4M3)
    return codes.reshape(*lead, -1)[..., :K], scales


def assert_same(found, wanted):
    codes, scales = (np.asarray(array) for array in found)
    assert (codes.dtype, scales.dtype) == (E4M3, np.float32)
    np.testing.assert_array_equal(scales, wanted[1])
    np.testing.assert_array_equal(codes.view(np.uint8), wanted[0].view(np.uint8))


@pytest.mark.parametrize('scale', ['float32', 'power_of_two'])
@pytest.mark.parametrize(
    ('shape', 'columns', 'dtype'),
    [
        ((2, 5, 300), 128, ml_dtypes.bfloat16),
        ((40, 512), 128, np.float32),
        ((7, 100), 32, np.float16),
        ((9, 64), 128, np.float32),
    ],
)
def test_codes_and_scales_are_numpys(shape, columns, dtype, scale):
    x = drawn(shape, dtype)
    run = jax.jit(quantize_rows, static_argnums=(1, 2))
    assert_same(run(jnp.asarray(x), columns, scale), expected(x, columns, scale))


def test_a_quotient_is_rounded_once():
    """All sizes of float32: by a broadcast divisor and by a constant, where XLA would multiply by a reciprocal."""
    random = np.random.default_rng(0)
    x, divisor = (random.standard_normal(shape).astype(np.float32) for shape in ((1024, 256), (1024, 1)))
    x = (x * 10.0 ** random.integers(-12, 12, x.shape)).astype(np.float32)
    divisor = np.abs(divisor) + np.float32(0.01)
    found = jax.jit(lambda x, d: (exact_divide(x, d), exact_divide(x, 448.0)))(x, divisor)
    np.testing.assert_array_equal(found[0], x / divisor)
    np.testing.assert_array_equal(found[1], x / np.float32(448))


def test_what_is_not_finite_shows():
    x = np.ones((4, 256), np.float32)
    x[0, 3], x[1, 130], x[2, 7] = np.nan, np.inf, -np.inf
    codes, scales = (np.asarray(array, np.float32) for array in quantize_rows(jnp.asarray(x)))
    with np.errstate(invalid='ignore'):
        numbers = codes.reshape(4, 2, 128) * scales[..., None]
    wanted = np.zeros((4, 2), bool)
    wanted[0, 0] = wanted[1, 1] = wanted[2, 0] = True
    np.testing.assert_array_equal(np.isnan(numbers).any(-1), wanted)
    np.testing.assert_array_equal(numbers[~wanted], 1)


def assert_near(found, wanted, once=1e-6):
    """Within half a step of E4M3 of what float64 says: 2^-4 of a number, or 2^-10 scales where codes are subnormal;
    and within `once`, by which the numbers themselves may be off."""
    codes, scales = (np.asarray(array, np.float64) for array in found)
    K = wanted.shape[-1]
    blocks = np.abs(np.pad(wanted, ((0, 0), (0, -K % 128)))).reshape(len(wanted), -1, 128).max(-1)
    np.testing.assert_allclose(scales, blocks / 448, rtol=once)
    wide = scales.repeat(128, -1)[:, :K]
    assert (np.abs(codes * wide - wanted) <= (1 + 100 * once) * (np.abs(wanted) / 16 + wide / 1024)).all()


def gated_and_normed(rows=6, width=300, dtype=ml_dtypes.bfloat16):
    """gate, up, weight, and in float64: silu(gate) * up, RMSNorm(up) * weight."""
    random = np.random.default_rng(1)
    gate, up = (random.standard_normal((rows, width)).astype(dtype) for _ in range(2))
    weight = random.uniform(0.5, 2, width).astype(np.float32)
    wide_gate, wide_up = gate.astype(np.float64), up.astype(np.float64)
    normed = wide_up / np.sqrt((wide_up**2).mean(-1, keepdims=True) + 1e-5) * weight
    return gate, up, weight, wide_gate / (1 + np.exp(-wide_gate)) * wide_up, normed


def test_fused_forms_quantize_what_they_say():
    gate, up, weight, gated, normed = gated_and_normed(dtype=np.float32)
    assert_near(quantize_gated(jnp.asarray(gate), jnp.asarray(up)), gated)
    found = quantize_normed(jnp.asarray(up).reshape(2, 3, 300), jnp.asarray(weight), 1e-5)
    assert found[0].shape == (2, 3, 300)
    assert found[1].shape == (2, 3, 3)
    assert_near([array.reshape(6, -1) for array in found], normed)


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
def test_fused_forms_round_as_an_array_in_between_would(dtype):
    """Numbers of 16 bits, each within half a step of what float64 says, are what is quantized: scales show it."""
    gate, up, weight, gated, normed = gated_and_normed(dtype=dtype)
    run = jax.jit(lambda gate, up, weight: (quantize_gated(gate, up), quantize_normed(up, weight, 1e-5)))
    for (_, scales), wanted in zip(run(gate, up, weight), (gated, normed), strict=True):
        blocks = np.abs(np.pad(wanted.astype(dtype).astype(np.float32), ((0, 0), (0, 84)))).reshape(6, 3, 128).max(-1)
        np.testing.assert_array_equal(np.asarray(scales), blocks / np.float32(448))


def test_what_is_refused_is_named():
    x = jnp.ones((4, 128))
    with pytest.raises(ValueError, match="scale='e8m0': expected one of float32, power_of_two"):
        quantize_rows(x, scale='e8m0')
    with pytest.raises(ValueError, match="implementation='fast': expected one of auto, reference, mosaic"):
        quantize_rows(x, implementation='fast')
    with pytest.raises(ValueError, match='cannot be used: the platform is cpu, not gpu'):
        quantize_rows(x, implementation='mosaic')
    with pytest.raises(ValueError, match='columns=0'):
        quantize_rows(x, 0)
    with pytest.raises(ValueError, match='expected at least one column'):
        quantize_rows(jnp.ones((4, 0)))
    with pytest.raises(ValueError, match='expected floating-point numbers'):
        quantize_rows(jnp.ones((4, 128), jnp.int32))
    with pytest.raises(ValueError, match='expected the same'):
        quantize_gated(x, x[:, :64])
    with pytest.raises(ValueError, match=r'weight_K \(64,\)'):
        quantize_normed(x, jnp.ones(64), 1e-5)


def test_mosaic_serves_hopper_only():
    def reason(kind, shape=(8, 256), dtype=jnp.bfloat16, columns=128):
        device = AbstractDevice(device_kind=kind, num_cores=132, platform='gpu')
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return refusal([jax.ShapeDtypeStruct(shape, dtype)], columns)

    hopper = 'NVIDIA H100 80GB HBM3'
    assert reason(hopper) is None
    assert 'not of the Hopper generation' in reason('NVIDIA B200')
    assert 'not a multiple of 32' in reason(hopper, (8, 200))
    assert 'no rows' in reason(hopper, (0, 256))
    assert '32 columns share a scale' in reason(hopper, columns=32)


def interpreted(*arrays, **options):
    """The Mosaic kernel in the interpreter, with races looked for."""
    plgpu = pytest.importorskip('jax.experimental.pallas.mosaic_gpu')
    if not hasattr(plgpu, 'InterpretGPUParams'):
        pytest.skip(f'the GPU interpreter of jax {jax.__version__} knows no layouts: 0.11 does')
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    from jpt.kernels.mosaic_quantize import quantize

    found = quantize(*map(jnp.asarray, arrays), interpret=plgpu.InterpretGPUParams(detect_races=True), **options)
    assert not get_races().races_found
    return found


@pytest.mark.parametrize('scale', ['float32', 'power_of_two'])
@pytest.mark.parametrize(('shape', 'dtype'), [((203, 352), ml_dtypes.bfloat16), ((3, 128), np.float32)])
def test_mosaic_is_equal_to_the_bit(shape, dtype, scale):
    """Rows and columns end inside a tile, blocks have several tiles; and fewer rows than a tile has."""
    x = drawn(shape, dtype)
    assert_same(interpreted(x, scale=scale), expected(x, 128, scale))


def test_mosaic_fused_forms():
    from jpt.kernels.block_quantize import silu_times

    gate, up, weight, gated, normed = gated_and_normed(70, 288)
    assert_near(interpreted(gate, up, produce=silu_times), gated, 2.0**-8)
    inverse = 1 / np.sqrt((up.astype(np.float32) ** 2).mean(-1) + np.float32(1e-5))
    assert_near(interpreted(up, row_factor=jnp.asarray(inverse), column_factor=jnp.asarray(weight)), normed, 2.0**-8)
