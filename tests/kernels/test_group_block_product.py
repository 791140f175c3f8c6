"""Products of codes over the rows of each group against the same numbers multiplied in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_blocks import assert_close, operands, product

from jpt.kernels.block_tiles import TILES, Tile
from jpt.kernels.group_block_product import group_block_product


def given(runs, O, K, spare=0):
    """Operands [O, R] and [K, R] with their scales, the runs of each group, y and the size of its sums."""
    total = sum(runs) + spare
    a, a_scale, b, b_scale = operands(O, K, 128 * total, each=True)
    y, size, at = np.zeros((len(runs), O, K)), np.zeros((len(runs), O, K)), 0
    for group, count in enumerate(runs):
        wide, narrow = slice(128 * at, 128 * (at + count)), slice(at, at + count)
        if count:
            y[group], size[group] = product(a[:, wide], a_scale[:, narrow], b[:, wide], b_scale[:, narrow], each=True)
        at += count
    return [*map(jnp.asarray, (a, a_scale, b, b_scale)), jnp.asarray(runs, jnp.int32)], y, size


@pytest.mark.parametrize(
    ('runs', 'shape', 'spare'), [([2, 0, 3, 1], (20, 36), 2), ([0, 0], (5, 9), 1), ([4], (1, 3), 0)]
)
def test_product(runs, shape, spare):
    arrays, y, size = given(runs, *shape, spare)
    assert_close(jax.jit(group_block_product)(*arrays), y, size)


def test_what_is_refused_is_named():
    (a, a_scale, b, b_scale, runs), *_ = given([1, 1], 8, 8)
    with pytest.raises(ValueError, match='250 rows: expected a multiple of 128'):
        group_block_product(a[:, :250], a_scale, b[:, :250], b_scale, runs)
    with pytest.raises(ValueError, match=r'b_scale float32\(8, 1\): expected float32\(8, 2\)'):
        group_block_product(a, a_scale, b, b_scale[:, :1], runs)
    with pytest.raises(ValueError, match=r'runs_E float32\(2,\): expected int32'):
        group_block_product(a, a_scale, b, b_scale, runs.astype(jnp.float32))
    with pytest.raises(ValueError, match='cannot be used: the platform is cpu, not gpu'):
        group_block_product(a, a_scale, b, b_scale, runs, implementation='mosaic')


@pytest.mark.parametrize(
    ('tile', 'shape'),
    [
        (TILES[0], (203, 160)),
        (Tile(256, 64, 2), (300, 72)),
        (Tile(64, 128, 3), (72, 304)),
        (Tile(128, 32, 2), (40, 40)),
    ],
)
def test_mosaic(tile, shape):
    """The kernel in the interpreter, with races looked for: groups with and without runs, runs of nobody."""
    plgpu = pytest.importorskip('jax.experimental.pallas.mosaic_gpu')
    if not hasattr(plgpu, 'InterpretGPUParams'):
        pytest.skip(f'the GPU interpreter of jax {jax.__version__} knows no transposed views and layouts: 0.11 does')
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    from jpt.kernels.mosaic_group_block import product as mosaic

    arrays, y, size = given([0, 3, 0, 0, 1, 2, 0], *shape, spare=1)
    a, a_scale, *_ = arrays
    arrays[:2] = a.at[:, 6 * 128 :].set(jnp.nan), a_scale.at[:, 6:].set(jnp.nan)  # of nobody
    found = mosaic(*arrays, tile=tile, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert not get_races().races_found
    assert_close(found, y, size)
