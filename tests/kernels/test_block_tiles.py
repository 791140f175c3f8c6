"""Which tile a blockwise product gets, beside shapes reckoned by hand for an H100's 132 multiprocessors."""

import pytest

from jpt.kernels.block_tiles import LARGEST, Tile, choose_tile, rounds


def test_a_step_takes_as_long_as_what_it_loads_or_multiplies():
    assert LARGEST.cycles == 1536  # 49,152 bytes by 32 a cycle; 4,194,304 products by 4,096 would be 1,024
    assert Tile(64, 32, 8).cycles == 384
    assert Tile(1024, 1024, 1).cycles == 32768  # of products


def test_rounds():
    assert rounds(Tile(128, 128, 5), 4096, 7168, 132) == 14  # 1,792 tiles
    assert rounds(Tile(128, 128, 5), 4097, 7168, 132) == 14  # 1,848
    assert rounds(Tile(128, 128, 5), 4096, 7168, 132, groups=8) == 17  # 39 x 56
    assert rounds(Tile(128, 128, 5), 3, 7168, 132, groups=8) == 2  # no more runs than rows: 3 x 56


@pytest.mark.parametrize(
    ('shape', 'sides'),
    [
        ((4096, 7168), (128, 128)),  # 14 rounds of 1,024 cycles; of 64 x 128: 28 of 768
        ((512, 4096), (128, 128)),  # 128 tiles; of 256 x 64 as many, of 1,280 cycles
        ((128, 7168), (128, 64)),  # 112 tiles; as good as 64 x 128, but weights are read once
        ((64, 7168), (64, 64)),
        ((1, 2048), (64, 32)),  # 64 tiles, one round: the smallest
        ((65536, 64), (256, 64)),  # no columns for more
    ],
)
def test_the_tile_that_is_finished_first(shape, sides):
    assert choose_tile(*shape, 132)[:2] == sides


def test_few_rows_of_many_groups_get_few_rows():
    assert choose_tile(512, 768, 132, groups=128)[:2] == (64, 128)
