"""Which tiles of blockwise FP8 products compile for an H100 without spills: a sweep that needs no GPU.

    pip install -e '.[aot]' && python benchmarks/tiles.py [--json]

Every tile of 64 to 256 rows and 32 to 128 columns (not 256 x 32, which loads too much) is compiled with as many steps
in flight as fit in shared memory, at most 8: for results of 16 and of 32 bits, with a scale for every row of b, for
grouped rows, and for the rows of each group. Printed is what the assembler says of it, and whether it is in the table
(jpt/kernels/block_tiles.py); then which tile of the table each shape of kernels.py gets, and the share of an H100's
peak at which it would multiply if nothing but what the choice reckons with cost time (writing the result is left out).
Nothing is timed. (That no nvdisasm is there does not matter.)
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import BY_GROUP, GROUPED, PRODUCTS, blocks

from jpt.kernels import mosaic_block_matmul, mosaic_group_block, mosaic_grouped_block
from jpt.kernels.block_tiles import BLOCK, MULTIPLIED, TILES, Tile, choose_tile, rounds
from jpt.kernels.low_precision import E4M3
from jpt.sharding.topology import topology_devices

SHAPES = [(4096, 4096, 7168), (2048, 1280, 768), (300, 2880, 2880)]  # what is spilled differs from shape to shape
E = 8
MOST_STEPS = 8
SPILLED = re.compile(r'bytes stack frame, (\d+) bytes spill stores')
MULTIPROCESSORS = 132
Operands = tuple[tuple[tuple[int, ...], Any], ...]  # shapes and dtypes


class Form(NamedTuple):
    """One way of multiplying: which kernel, and the operands for a shape (M, N, K)."""

    name: str
    run: Callable[..., Any]
    operands: Callable[[int, int, int], Operands]


def forms() -> Iterator[Form]:
    """All that the table is asked for."""

    def plain(M: int, N: int, K: int) -> Operands:
        scales = ((M, blocks(K)), jnp.float32), ((blocks(N), blocks(K)), jnp.float32)
        return ((M, K), E4M3), scales[0], ((N, K), E4M3), scales[1]

    def each(M: int, N: int, K: int) -> Operands:
        return *plain(M, N, K)[:3], ((N, blocks(K)), jnp.float32)

    def grouped(M: int, N: int, K: int) -> Operands:
        kernels = ((E, N, K), E4M3), ((E, blocks(N), blocks(K)), jnp.float32), ((E,), jnp.int32)
        return *plain(M, N, K)[:2], *kernels

    def by_group(M: int, N: int, K: int) -> Operands:
        runs = blocks(K)
        a, b = ((M, runs * BLOCK), E4M3), ((N, runs * BLOCK), E4M3)
        return a, ((M, runs), jnp.float32), b, ((N, runs), jnp.float32), ((E,), jnp.int32)

    yield Form('float32, rows of each group', mosaic_group_block.product, by_group)
    for dtype in (jnp.bfloat16, jnp.float32):
        one, many = (partial(one.product, dtype=dtype) for one in (mosaic_block_matmul, mosaic_grouped_block))
        said = jnp.dtype(dtype).name
        yield Form(said, one, plain)
        yield Form(f'{said}, scales of rows', one, each)
        yield Form(f'{said}, grouped', many, grouped)


def compiled(run: Callable[..., Any], operands: Operands) -> str:
    """What the assembler says of the program's one kernel.

    Raises:
      ValueError: it does not compile: too much shared memory.
      RuntimeError: nothing is said of spilled registers, or of several kernels.
    """
    mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,), devices=topology_devices(1))
    given = [jax.ShapeDtypeStruct(*one, sharding=NamedSharding(mesh, P())) for one in operands]
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        os.environ.update(MOSAIC_GPU_DUMP_TO=folder, MOSAIC_GPU_DUMP_PTXAS='1')
        jax.jit(run).trace(*given).lower().compile()
        report = ''.join(path.read_text() for path in Path(folder).glob('*.ptxas'))
    if len(SPILLED.findall(report)) != 1:
        raise RuntimeError(f'expected the spilled registers of one kernel, found {report!r}')
    return report


def deepest(form: Form, rows: int, columns: int) -> dict[str, Any] | None:
    """The tile of these sides with the most steps that fit, and what the assembler says of it, the worst of SHAPES."""
    for steps in range(MOST_STEPS, 1, -1):
        tile = Tile(rows, columns, steps)
        try:
            reports = [compiled(partial(form.run, tile=tile), form.operands(*shape)) for shape in SHAPES]
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if 'shared memory' not in str(error):
                raise
            continue
        spilled = max(int(SPILLED.findall(report)[0]) for report in reports)
        waits = any('Potential Performance Loss' in report for report in reports)
        used = [other.steps for other in TILES if other[:2] == (rows, columns)]
        return {'form': form.name, 'tile': tile, 'spilled': spilled, 'waits': waits, 'used': used[0] if used else None}
    return None


def said(row: dict[str, Any]) -> str:
    """One tile as it is printed."""
    tile, used = row['tile'], f'in the table with {row["used"]}' if row['used'] else 'not in the table'
    more = ', products in sequence' if row['waits'] else ''
    return (
        f'{row["form"]}: {tile.rows} x {tile.columns}, {tile.steps} steps: {row["spilled"]} bytes spilled{more}; {used}'
    )


def choices() -> Iterator[dict[str, Any]]:
    """The tile for every shape of kernels.py."""
    shapes = [(f'{M} x {N} x {K}', M, N, 1) for M, N, K in PRODUCTS]
    shapes += [(f'{M} x {N} x {K}, M rows of {E} groups', M, N, E) for M, N, K, E in GROUPED]
    shapes += [(f'{O} x {K} for each of {E} groups, {R} rows in all', E * O, K, 1) for O, K, R, E in BY_GROUP]
    for name, M, N, groups in shapes:
        tile = choose_tile(M, N, MULTIPROCESSORS, groups)
        each = rounds(tile, M, N, MULTIPROCESSORS, groups)
        share = M * N * BLOCK / MULTIPLIED / MULTIPROCESSORS / (each * tile.cycles)
        yield {'shape': name, 'tile': tile, 'tiles_each': each, 'share_of_peak': share}


def main() -> None:
    """Prints a line per tile as it is compiled, then one per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    print(f'jax {jax.__version__}, compiled for an H100 that is not here')
    rows = []
    for form, height, width in product(forms(), (256, 128, 64), (128, 64, 32)):
        if height <= 4 * width and (row := deepest(form, height, width)) is not None:
            rows.append(row)
            print(said(row), flush=True)
    shapes = list(choices())
    for one in shapes:
        tile = one['tile']
        print(f'{one["shape"]}: {tile.rows} x {tile.columns}, at most {one["share_of_peak"]:.0%} of the peak')
    if options.json:
        print(json.dumps({'benchmark': 'tiles', 'jax': jax.__version__, 'rows': rows, 'shapes': shapes}))


if __name__ == '__main__':
    main()
