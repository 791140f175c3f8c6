"""Products of codes with a scale per block against the same numbers multiplied in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from numpy_blocks import assert_close, operands, product

from jpt.kernels.block_matmul import block_matmul, refusal
from jpt.kernels.block_tiles import LARGEST, TILES, Tile


@pytest.mark.parametrize('shape', [(5, 300, 200), (130, 128, 512), (1, 7, 1)])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_product(shape, dtype):
    arrays = operands(*shape)
    found = jax.jit(block_matmul, static_argnums=4)(*map(jnp.asarray, arrays), dtype)
    assert_close(found, *product(*arrays), dtype)


@pytest.mark.parametrize('shape', [(5, 300, 200), (3, 2, 130)])
def test_a_scale_for_each_row_of_b(shape):
    arrays = operands(*shape, each=True)
    found = jax.jit(block_matmul, static_argnums=4)(*map(jnp.asarray, arrays), np.float32)
    assert_close(found, *product(*arrays, each=True))


def test_no_rows_give_no_rows():
    arrays = operands(0, 16, 128)
    assert block_matmul(*map(jnp.asarray, arrays)).shape == (0, 16)


def test_what_is_refused_is_named():
    a, a_scale, b, b_scale = map(jnp.asarray, operands(4, 160, 256))
    with pytest.raises(ValueError, match=r'expected \[M, K\] and \[N, K\]'):
        block_matmul(a, a_scale, b[:, :128], b_scale)
    with pytest.raises(ValueError, match='codes of float32 and float8_e4m3fn: expected float8_e4m3fn'):
        block_matmul(a.astype(jnp.float32), a_scale, b, b_scale)
    with pytest.raises(ValueError, match=r'a_scale float32\(4, 1\): expected float32\(4, 2\)'):
        block_matmul(a, a_scale[:, :1], b, b_scale)
    with pytest.raises(ValueError, match=r'b_scale bfloat16\(2, 2\): expected float32\(2, 2\)'):
        block_matmul(a, a_scale, b, b_scale.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match='dtype=int8: expected one of bfloat16, float16, float32'):
        block_matmul(a, a_scale, b, b_scale, jnp.int8)
    with pytest.raises(ValueError, match="implementation='fast': expected one of auto, reference, mosaic"):
        block_matmul(a, a_scale, b, b_scale, implementation='fast')
    with pytest.raises(ValueError, match='cannot be used: the platform is cpu, not gpu'):
        block_matmul(a, a_scale, b, b_scale, implementation='mosaic')


def test_mosaic_serves_hopper_and_whole_lines():
    def reason(kind, M, N, K, dtype=jnp.bfloat16):
        device = AbstractDevice(device_kind=kind, num_cores=132, platform='gpu')
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            codes = [jax.ShapeDtypeStruct((side, K), jnp.float8_e4m3fn) for side in (M, N)]
            return refusal(*codes, dtype)

    hopper = 'NVIDIA H200'
    assert reason(hopper, 1, 576, 2880) is None
    assert 'not of the Hopper generation' in reason('NVIDIA A100-SXM4-80GB', 1, 576, 2880)
    assert 'depth 200 is not a multiple of 32' in reason(hopper, 8, 128, 200)
    assert 'rows of 8 bfloat16' in reason(hopper, 8, 8, 256)
    assert reason(hopper, 8, 8, 256, jnp.float32) is None
    assert 'no rows' in reason(hopper, 0, 128, 256)


# Rows, columns and depth that end inside a tile, an odd number of steps, several tiles to a block, fewer rows than 8.
SHAPES = [(203, 304, 352), (5, 288, 512), (300, 384, 128)]


@pytest.mark.parametrize(
    ('tile', 'shape', 'each'),
    [
        *((tile, shape, False) for tile, shape in zip((LARGEST, *TILES), SHAPES * 3, strict=False)),
        *((tile, shape, False) for tile in ((128, 128, 4), (64, 128, 6)) for shape in SHAPES),
        *((tile, shape, True) for tile in ((64, 128, 6), (128, 128, 4), (256, 64, 4)) for shape in SHAPES),
    ],
)
def test_mosaic(tile, shape, each):
    """Every tile of the table in the interpreter, with races looked for; `each` row of b with a scale."""
    plgpu = pytest.importorskip('jax.experimental.pallas.mosaic_gpu')
    if not hasattr(plgpu, 'InterpretGPUParams'):
        pytest.skip(f'the GPU interpreter of jax {jax.__version__} knows no transposed views and layouts: 0.11 does')
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    from jpt.kernels.mosaic_block_matmul import product as mosaic

    arrays = operands(*shape, each=each)
    dtype = ml_dtypes.bfloat16 if tile == LARGEST else np.float32
    options = {'tile': Tile(*tile), 'interpret': plgpu.InterpretGPUParams(detect_races=True)}
    found = mosaic(*map(jnp.asarray, arrays), dtype, **options)
    assert not get_races().races_found
    assert_close(found, *product(*arrays, each=each), dtype)
