"""Which tile of the result a block of a blockwise FP8 product works on at a time, on Hopper.

TILES are those that compile for an H100 without spilled registers, with as many steps in flight as its shared memory
has room for (at most 8, and for groups of rows too): `python benchmarks/tiles.py` tries them and prints what the
assembler says. Which of them a shape gets is reckoned from what a tile loads and multiplies and how many a
multiprocessor gets; `benchmarks/kernels.py --tiles` compares them by the clock, on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

BLOCK = 128  # columns of K that share a scale: one step
MULTIPLIED = 4096  # products of two numbers of 8 bits that a multiprocessor adds up in a cycle: its data sheet
LOADED = 32  # bytes that reach a multiprocessor in a cycle where all of them load from the L2 cache: an estimate


class Tile(NamedTuple):
    """The part of the result that a block works on at a time, and how many steps of K are in flight."""

    rows: int
    columns: int
    steps: int

    @property
    def cycles(self) -> float:
        """Of one step: what it multiplies, or what it loads, whichever is longer."""
        return max(self.rows * self.columns * BLOCK / MULTIPLIED, (self.rows + self.columns) * BLOCK / LOADED)


# Among equals the first is taken: more rows read weights, which come from further away, less often.
TILES = tuple(
    Tile(*sides)
    for sides in ((128, 128, 5), (256, 64, 4), (128, 64, 7), (128, 32, 8), (64, 128, 8), (64, 64, 8), (64, 32, 8))
)
LARGEST = Tile(256, 128, 3)  # loads least, but spills a few registers on some shapes: not in the table


def rounds(tile: Tile, M: int, N: int, multiprocessors: int, groups: int = 1) -> int:
    """How many tiles of a result [M, N] the busiest of so many multiprocessors gets.

    Rows of two groups are never in one tile: at worst every group but one has one more that is not full.
    """
    runs = min(-(-M // tile.rows) + groups - 1, M)
    return -(-runs * -(-N // tile.columns) // multiprocessors)


def choose_tile(M: int, N: int, multiprocessors: int, groups: int = 1) -> Tile:
    """The tile of the table with which a result [M, N], whose rows are of so many groups, is finished first."""
    return min(TILES, key=lambda tile: rounds(tile, M, N, multiprocessors, groups) * tile.cycles)
