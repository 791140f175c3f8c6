"""Grouped blockwise products against float64, group by group."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy_blocks import assert_close, operands, product

from jpt.kernels.grouped_block_matmul import grouped_block_matmul


def given(sizes, M, N, K):
    """Operands whose rows of no group have NaN, and what the product is: y and the magnitudes behind it."""
    a, a_scale, b, b_scale = operands(M, N, K, (len(sizes),))
    own = sum(sizes)
    a[own:] = np.nan
    a_scale[own:] = np.nan
    y, size = np.zeros((M, N)), np.ones((M, N))
    for group, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[group], end)
        y[rows], size[rows] = product(a[rows], a_scale[rows], b[group], b_scale[group])
    return (a, a_scale, b, b_scale, np.array(sizes, np.int32)), y, size


@pytest.mark.parametrize(
    ('sizes', 'shape'),
    [([0, 13, 0, 0, 30, 1, 7, 0], (56, 200, 300)), ([0, 0, 51, 0], (51, 64, 128)), ([0, 0], (9, 130, 40))],
)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_product(sizes, shape, dtype):
    arrays, y, size = given(sizes, *shape)
    found = jax.jit(grouped_block_matmul, static_argnums=5)(*map(jnp.asarray, arrays), dtype)
    assert_close(found, y, size, dtype)


def test_what_is_refused_is_named():
    (a, a_scale, b, b_scale, sizes), *_ = given([2, 2], 5, 160, 256)
    with pytest.raises(ValueError, match=r'expected \[M, K\] and \[E, N, K\]'):
        grouped_block_matmul(a, a_scale, b[0], b_scale, sizes)
    with pytest.raises(ValueError, match=r'b_scale float32\(1, 2, 2\): expected float32\(2, 2, 2\)'):
        grouped_block_matmul(a, a_scale, b, b_scale[:1], sizes)
    with pytest.raises(ValueError, match=r'sizes_E int64\(2,\): expected int32\(2,\)'):
        grouped_block_matmul(a, a_scale, b, b_scale, sizes.astype(np.int64))
    with pytest.raises(ValueError, match='cannot be used: the platform is cpu, not gpu'):
        grouped_block_matmul(a, a_scale, b, b_scale, sizes, implementation='mosaic')


# Runs of rows that four groups share, whole runs, rows of nobody, an odd number of steps; and few rows.
@pytest.mark.parametrize(
    ('sizes', 'shape'), [([70, 0, 1, 200, 0, 20], (303, 304, 352)), ([0, 5, 0, 9], (20, 288, 256))]
)
@pytest.mark.parametrize(
    ('tile', 'dtype'),
    [
        ((64, 128, 3), np.float32),
        ((128, 128, 3), ml_dtypes.bfloat16),
        ((256, 64, 3), np.float32),
        ((64, 32, 3), ml_dtypes.bfloat16),
    ],
)
def test_mosaic(sizes, shape, tile, dtype):
    """The kernel in the interpreter, with races looked for."""
    plgpu = pytest.importorskip('jax.experimental.pallas.mosaic_gpu')
    if not hasattr(plgpu, 'InterpretGPUParams'):
        pytest.skip(f'the GPU interpreter of jax {jax.__version__} knows no transposed views and layouts: 0.11 does')
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    from jpt.kernels.block_tiles import Tile
    from jpt.kernels.mosaic_grouped_block import product as mosaic

    arrays, y, size = given(sizes, *shape)
    options = {'tile': Tile(*tile), 'interpret': plgpu.InterpretGPUParams(detect_races=True)}
    found = mosaic(*map(jnp.asarray, arrays), dtype, **options)
    assert not get_races().races_found
    assert_close(found, y, size, dtype)
