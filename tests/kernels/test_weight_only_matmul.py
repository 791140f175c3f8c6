"""Few rows times a weight in 8 bits against the same numbers multiplied in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from numpy_blocks import assert_close, numbers, operands

from jpt.kernels.weight_only_matmul import refusal, weight_only_matmul


def given(M, N, K, dtype):
    """x, codes, scale, and what the product is: y and the magnitudes behind it."""
    _, _, codes, scale = operands(M, N, K)
    x = np.random.default_rng(1).standard_normal((M, K)).astype(dtype)
    left, right = x.astype(np.float64), numbers(codes, scale, 128)
    return (x, codes, scale), left @ right.T, np.abs(left) @ np.abs(right).T


@pytest.mark.parametrize('shape', [(5, 300, 200), (1, 128, 512), (3, 7, 1)])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.float16])
def test_product(shape, dtype):
    arrays, y, size = given(*shape, dtype)
    found = jax.jit(weight_only_matmul, static_argnums=3)(*map(jnp.asarray, arrays), np.float32)
    assert_close(found, y, size)


def test_the_result_has_the_dtype_of_the_rows():
    arrays, y, size = given(2, 40, 130, ml_dtypes.bfloat16)
    assert_close(weight_only_matmul(*map(jnp.asarray, arrays)), y, size, ml_dtypes.bfloat16)


def test_what_is_refused_is_named():
    (x, codes, scale), *_ = given(4, 160, 256, np.float32)
    with pytest.raises(ValueError, match=r'expected \[M, K\] and \[N, K\]'):
        weight_only_matmul(x[:, :128], codes, scale)
    with pytest.raises(ValueError, match='x of int8 and codes of float8_e4m3fn: expected one of bfloat16'):
        weight_only_matmul(x.astype(np.int8), codes, scale)
    with pytest.raises(ValueError, match=r'scale float32\(2, 1\): expected float32\(2, 2\)'):
        weight_only_matmul(x, codes, scale[:, :1])
    with pytest.raises(ValueError, match='cannot be used: the platform is cpu, not gpu'):
        weight_only_matmul(x, codes, scale, implementation='mosaic')


def test_mosaic_serves_few_rows_on_hopper():
    def reason(kind, M=16, K=4096, dtype=jnp.bfloat16, N=160):
        device = AbstractDevice(device_kind=kind, num_cores=132, platform='gpu')
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return refusal(jax.ShapeDtypeStruct((M, K), dtype), jax.ShapeDtypeStruct((N, K), jnp.float8_e4m3fn))

    hopper = 'NVIDIA H100 80GB HBM3'
    assert reason(hopper) is None
    assert 'not of the Hopper generation' in reason('NVIDIA B200')
    assert '65 rows, not 1 to 64' in reason(hopper, 65)
    assert '0 rows, not 1 to 64' in reason(hopper, 0)
    assert 'float16, not bfloat16' in reason(hopper, dtype=jnp.float16)
    assert '300 rows, not a multiple of 8' in reason(hopper, N=300)
    assert 'not a multiple of 32' in reason(hopper, K=200)


# Rows and columns that end inside a tile, parts of K of different length; more rows than one instruction takes.
@pytest.mark.parametrize(('shape', 'parts'), [((3, 304, 1056), 2), ((17, 128, 512), 1), ((64, 136, 416), 4)])
def test_mosaic(shape, parts):
    """The kernel in the interpreter, with races looked for."""
    plgpu = pytest.importorskip('jax.experimental.pallas.mosaic_gpu')
    if not hasattr(plgpu, 'InterpretGPUParams'):
        pytest.skip(f'the GPU interpreter of jax {jax.__version__} knows no transposed views and layouts: 0.11 does')
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    from jpt.kernels.mosaic_weight_only import product

    arrays, y, size = given(*shape, ml_dtypes.bfloat16)
    options = {'parts': parts, 'interpret': plgpu.InterpretGPUParams(detect_races=True)}
    found = product(*map(jnp.asarray, arrays), np.float32, **options)
    assert not get_races().races_found
    assert_close(found, y, size)


def test_every_code_is_exact_in_bfloat16():
    """NaN included: all 256, against ml_dtypes."""
    pytest.importorskip('jax.experimental.pallas.mosaic_gpu')
    from jpt.kernels.mosaic_weight_only import to_bfloat16

    codes = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    found = np.asarray(to_bfloat16(jnp.asarray(codes)), np.float32)
    np.testing.assert_array_equal(found, codes.astype(np.float32))


def test_parts_give_every_multiprocessor_work():
    from jpt.kernels.mosaic_weight_only import choose_parts

    assert choose_parts(4096, 14336, 8, 264) == 8
    assert choose_parts(14336, 4096, 8, 264) == 2
    assert choose_parts(24576, 4096, 8, 264) == 1
    assert choose_parts(4096, 14336, 64, 264) == 3, 'parts of 64 rows weigh more'
    assert choose_parts(128, 128, 8, 264) == 1
