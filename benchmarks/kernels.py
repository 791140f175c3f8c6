"""FP8 kernels beside XLA, torch and the roofline, in one run on one GPU.

    python benchmarks/kernels.py [--only=quantize] [--tiles] [--repeats=20] [--json]      (--tiny: to try it on a CPU)

Six operations: quantized rows; blockwise products; the same of grouped rows; of the rows of each group; the gradient of
experts' weights, which is that with laying out and rounding; weight-only products. Beside each: what XLA makes of the
same formula, XLA's product in bfloat16, XLA's product after dequantizing, torch's blockwise product (cuBLASLt; of
grouped rows one after the other) where torch has CUDA, and the roofline of an H100: the longer of the operations at
their peak (8 bits: twice that of bfloat16) and the bytes that must be read and written once, both from its data sheet.
A time is that of one call among many in one program, each with operands of its own, the start of the program taken out.
Before it is timed, a kernel's result is compared with the reference's, and printed are the share of differing codes and
scales, or 1 - 2 xy / (x^2 + y^2), DeepGEMM's measure of products x and y: 0.001 and more ends the script with an error.
Without a GPU only the references run.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn, machine
from torch_blocks import block_product_ms

from jpt.kernels.block_matmul import block_matmul
from jpt.kernels.block_quantize import quantize_gated, quantize_normed, quantize_rows
from jpt.kernels.block_tiles import BLOCK, LARGEST, TILES
from jpt.kernels.group_block_product import group_block_product
from jpt.kernels.grouped_block_matmul import grouped_block_matmul
from jpt.kernels.grouped_matmul import grouped_matmul
from jpt.kernels.local_products import whole
from jpt.kernels.low_precision import E4M3
from jpt.kernels.weight_only_matmul import weight_only_matmul
from jpt.quant.formats import FORMATS
from jpt.quant.gradients import block_gradients
from jpt.quant.tensors import QTensor
from jpt.sharding.topology import H100

QUANTIZE = [(8192, 8192), (4096, 7168)]
PRODUCTS = [(4096, 7168, 16384), (4096, 4096, 7168), (4096, 24576, 4096), (4096, 4096, 12288), (64, 7168, 16384)]
GROUPED = [(32768, 4096, 7168, 8), (32768, 768, 2048, 128), (512, 768, 2048, 128)]
BY_GROUP = [(4096, 7168, 16384, 8), (768, 2048, 32768, 128)]
WEIGHT_ONLY = [(rows, *sides) for sides in [(14336, 4096), (4096, 14336), (24576, 4096)] for rows in (1, 16)]
RAGGED_BYTES = 2**32  # of the dense operand that lax.ragged_dot makes: larger ones are left out
LARGEST_DIFFERENCE = 0.001
Operands = tuple[jax.Array, ...]


class Case(NamedTuple):
    """One operation on one shape: what it takes, who computes it, and the least that it must do."""

    name: str
    draw: Callable[[jax.Array], Operands]  # operands from a key
    runs: dict[str, Callable[..., Any]]  # the first one is jpt's choice
    reference: Callable[..., Any]
    operations: float
    moved: float  # bytes
    peak: float = 2 * H100.bfloat16  # operations per second
    torch_shape: tuple[int, int, int] | None = None
    groups: int = 1
    checked: tuple[str, ...] = ('jpt',)  # those of the runs that are compared with the reference


def codes(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.clip(64 * jax.random.normal(key, shape, jnp.bfloat16), -448, 448).astype(E4M3)


def scales(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, 0.5, 2.0)


def blocks(size: int) -> int:
    return -(-size // BLOCK)


def wide(codes: jax.Array, scale: jax.Array, rows: int) -> jax.Array:
    """The numbers in bfloat16, with a scale for every `rows` x 128."""
    every = jnp.repeat(jnp.repeat(scale, rows, -2), BLOCK, -1)[..., : codes.shape[-2], : codes.shape[-1]]
    return (codes.astype(jnp.float32) * every).astype(jnp.bfloat16)


def quantize_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """Rows, silu(gate) * up and RMSNorm, from bfloat16; scales as products read them, with rows as neighbours."""
    # What is computed, how many operands [M, K] it has, and how many vectors [K].
    forms: dict[str, tuple[Callable[..., Any], int, int]] = {
        'quantize': (quantize_rows, 1, 0),
        'quantize gated': (quantize_gated, 2, 0),
        'quantize normed': (lambda x, weight, **options: quantize_normed(x, weight, 1e-6, **options), 1, 1),
    }

    def run(form: Callable[..., Any], *operands: jax.Array, implementation: str = 'auto') -> tuple[jax.Array, ...]:
        found, scale = form(*operands, implementation=implementation)
        return found, scale.T

    for M, K in shapes:
        for name, (form, count, vectors) in forms.items():

            def draw(key: jax.Array, sides: Any = ((M, K),) * count + ((K,),) * vectors) -> Operands:
                keys = jax.random.split(key, len(sides))
                return tuple(jax.random.normal(key, side, jnp.bfloat16) for key, side in zip(keys, sides, strict=True))

            xla = partial(run, form, implementation='reference')
            moved = M * K * (2 * count + 1 + 4 / BLOCK)
            yield Case(f'{name} {(M, K)}', draw, {'jpt': partial(run, form), 'XLA': xla}, xla, 0, moved)


def product_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """Codes times codes."""

    def xla(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> jax.Array:
        return wide(a, a_scale, 1) @ wide(b, b_scale, BLOCK).T

    def bfloat16(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))

    for M, N, K in shapes:

        def draw(key: jax.Array, M: int = M, N: int = N, K: int = K) -> Operands:
            keys = jax.random.split(key, 4)
            a, b = codes(keys[0], (M, K)), codes(keys[1], (N, K))
            return a, scales(keys[2], (M, blocks(K))), b, scales(keys[3], (blocks(N), blocks(K)))

        runs: dict[str, Callable[..., Any]] = {'jpt': block_matmul, 'XLA dequantized': xla, 'XLA bfloat16': bfloat16}
        reference = partial(block_matmul, implementation='reference')
        moved = M * K + N * K + 2 * M * N + 4 * blocks(K) * (M + blocks(N))
        yield Case(f'product {(M, N, K)}', draw, runs, reference, 2 * M * N * K, moved, torch_shape=(M, N, K))


def grouped_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """Rows of groups of one size; beside them the products in bfloat16 of jpt, of JAX's own kernel (on a GPU; it leaves
    the choice of its tiles to its caller) and of lax.ragged_dot.
    """

    def bfloat16(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(a, b, sizes)

    def ragged(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(a, b.swapaxes(1, 2), sizes)

    def pallas(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, sizes: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

        run = partial(ragged_dot, block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, transpose_rhs=True)
        return run(a, b, group_sizes=sizes, grid_block_n=math.gcd(8, b.shape[1] // 128))

    def xla(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(wide(a, a_scale, 1), wide(b, b_scale, BLOCK).swapaxes(1, 2), sizes)

    for M, N, K, E in shapes:

        def draw(key: jax.Array, M: int = M, N: int = N, K: int = K, E: int = E) -> Operands:
            keys = jax.random.split(key, 4)
            a, b = codes(keys[0], (M, K)), codes(keys[1], (E, N, K))
            b_scale = scales(keys[3], (E, blocks(N), blocks(K)))
            return a, scales(keys[2], (M, blocks(K))), b, b_scale, jnp.full(E, M // E, jnp.int32)

        runs: dict[str, Callable[..., Any]] = {'jpt': grouped_block_matmul, 'jpt bfloat16': bfloat16}
        if jax.default_backend() == 'gpu':
            runs['ragged_dot_mgpu bfloat16'] = pallas
        if 2 * M * K * E <= RAGGED_BYTES:
            runs.update({'XLA dequantized': xla, 'lax.ragged_dot bfloat16': ragged})
        reference = partial(grouped_block_matmul, implementation='reference')
        moved = M * K + min(E, M) * N * K + 2 * M * N + 4 * blocks(K) * (M + E * blocks(N))
        name, operations = f'grouped {(M, N, K, E)}', 2 * M * N * K
        yield Case(name, draw, runs, reference, operations, moved, torch_shape=(M, N, K), groups=E)


def by_group_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """Rows of each group added up, groups of one size: XLA's products are then those of a batch of matrices."""

    def batched(a: jax.Array, b: jax.Array, groups: int) -> jax.Array:
        a, b = (codes.reshape(len(codes), groups, -1).swapaxes(0, 1) for codes in (a, b))
        return jnp.einsum('eor,ekr->eok', a, b, preferred_element_type=jnp.float32)

    def xla(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, runs: jax.Array) -> jax.Array:
        return batched(wide(a, a_scale, 1), wide(b, b_scale, 1), len(runs))

    def bfloat16(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, runs: jax.Array) -> jax.Array:
        return batched(a, b, len(runs))

    for O, K, R, E in shapes:

        def draw(key: jax.Array, O: int = O, K: int = K, R: int = R, E: int = E) -> Operands:
            keys = jax.random.split(key, 4)
            a, b = codes(keys[0], (O, R)), codes(keys[1], (K, R))
            a_scale, b_scale = scales(keys[2], (O, blocks(R))), scales(keys[3], (K, blocks(R)))
            return a, a_scale, b, b_scale, jnp.full(E, blocks(R) // E, jnp.int32)

        runs: dict[str, Callable[..., Any]] = {
            'jpt': group_block_product,
            'XLA dequantized': xla,
            'XLA bfloat16': bfloat16,
        }
        reference = partial(group_block_product, implementation='reference')
        moved = (O + K) * (R + 4 * blocks(R)) + 4 * E * O * K
        yield Case(f'by group {(O, K, R, E)}', draw, runs, reference, 2 * O * K * R, moved)


def expert_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """The gradient of experts' weights from rows in bfloat16, groups of uneven sizes, beside a product in bfloat16."""

    def bfloat16(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
        unused = jnp.zeros((len(sizes), dy.shape[1], x.shape[1]), jnp.float32)
        return jax.vjp(lambda kernels: grouped_matmul(x, kernels, sizes), unused)[1](dy)[0]

    for O, K, M, E in shapes:

        def run(x: jax.Array, dy: jax.Array, sizes: jax.Array, *, where: Any, O: int = O, K: int = K) -> jax.Array:
            blank = jnp.zeros((len(sizes), blocks(O), blocks(K)), jnp.float32)
            form = FORMATS['fp8_block']
            weight = QTensor(jnp.zeros((len(sizes), O, K), E4M3), blank, format=form, weight_dtype='float32')
            return block_gradients(x, weight, sizes, where, dy)[1]  # that of x is not asked for, and not computed

        def draw(key: jax.Array, O: int = O, K: int = K, M: int = M, E: int = E) -> Operands:
            keys = jax.random.split(key, 3)
            x, dy = (jax.random.normal(key, (M, width), jnp.bfloat16) for key, width in zip(keys, (K, O), strict=False))
            sizes = jnp.bincount(jax.random.randint(keys[2], (M,), 0, E), length=E).astype(jnp.int32)
            return x, dy, sizes

        runs: dict[str, Callable[..., Any]] = {'jpt': partial(run, where=whole(2)), 'jpt bfloat16': bfloat16}
        moved = 2 * M * (O + K) + 4 * E * O * K
        yield Case(f"experts' dw {(O, K, M, E)}", draw, runs, partial(run, where=None), 2 * O * K * M, moved)


def weight_only_cases(shapes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """A few rows of bfloat16 times codes."""

    def xla(x: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        return x @ wide(b, scale, BLOCK).T

    def bfloat16(x: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, b, (((1,), (1,)), ((), ())))

    for M, N, K in shapes:

        def draw(key: jax.Array, M: int = M, N: int = N, K: int = K) -> Operands:
            keys = jax.random.split(key, 3)
            x = jax.random.normal(keys[0], (M, K), jnp.bfloat16)
            return x, codes(keys[1], (N, K)), scales(keys[2], (blocks(N), blocks(K)))

        runs: dict[str, Callable[..., Any]] = {
            'jpt': weight_only_matmul,
            'XLA dequantized': xla,
            'XLA bfloat16': bfloat16,
        }
        reference = partial(weight_only_matmul, implementation='reference')
        moved = N * K + 2 * M * (N + K) + 4 * blocks(N) * blocks(K)
        yield Case(f'weight only {(M, N, K)}', draw, runs, reference, 2 * M * N * K, moved, H100.bfloat16)


def with_tiles(case: Case) -> Case:
    """A blockwise product by the largest tile and every one of the table, instead of by its peers."""
    from jpt.kernels.mosaic_block_matmul import product

    runs: dict[str, Callable[..., Any]] = {'jpt': case.runs['jpt']}
    runs |= {str(tuple(tile)): partial(product, dtype=jnp.bfloat16, tile=tile) for tile in (LARGEST, *TILES)}
    return case._replace(runs=runs, checked=tuple(runs), torch_shape=None)


def per_call(run: Callable[..., Any], sets: list[Operands], repeats: int) -> float:
    """Milliseconds of a call: a program of all sets of operands less one of a few, by how many more they are."""
    few = max(1, len(sets) // 5)
    program = jax.jit(lambda sets: [run(*operands) for operands in sets])
    times = in_turn({'few': partial(program, sets[:few]), 'all': partial(program, sets)}, repeats)
    return (times['all'].wall_ms - times['few'].wall_ms) / (len(sets) - few)


def difference(found: Any, wanted: Any) -> float:
    """1 - 2 xy / (x^2 + y^2), 0 for equal ones; of codes and scales, how many differ of all."""
    if isinstance(found, tuple):
        same = [jnp.mean(a.astype(jnp.float32) != b.astype(jnp.float32)) for a, b in zip(found, wanted, strict=True)]
        return float(jnp.max(jnp.stack(same)))
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(1 - 2 * np.sum(found * wanted) / np.sum(found**2 + wanted**2))


def measure(case: Case, sets: int, repeats: int) -> dict[str, Any]:
    """Milliseconds by implementation, the roofline, and how far jpt's result is from the reference's."""
    drawn = [case.draw(key) for key in jax.random.split(jax.random.key(0), sets)]
    first = drawn[0]
    wanted = jax.jit(case.reference)(*first)
    apart = max(difference(jax.jit(run)(*first), wanted) for name, run in case.runs.items() if name in case.checked)
    del wanted
    times: dict[str, float | str] = {}
    for name, run in case.runs.items():
        given = drawn
        if 'bfloat16' in name:  # codes stand for themselves
            given = [tuple(x.astype(jnp.bfloat16) if x.dtype == E4M3 else x for x in one) for one in drawn]
        try:
            times[name] = per_call(run, given, repeats)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            times[name] = f'failed: {str(error).splitlines()[0]}'
    if case.torch_shape is not None:
        del drawn, given
        times['torch scaled_mm'] = block_product_ms(*case.torch_shape, sets, repeats, case.groups)
    bound = 1e3 * max(case.operations / case.peak, case.moved / H100.bandwidth)
    row = {'name': case.name, 'ms': times, 'difference': apart, 'operations': case.operations, 'moved': case.moved}
    return {**row, 'roofline_ms': bound if jax.default_backend() == 'gpu' else None}


def line(row: dict[str, Any]) -> str:
    """One row as it is printed: every time with what it means in TFLOP/s or GB/s."""
    cells = []
    for name, ms in {**row['ms'], 'roofline': row['roofline_ms']}.items():
        if isinstance(ms, str):
            cells.append(f'{name}: {ms}')
        elif ms is not None:
            work = f'{1e-9 * row["operations"] / ms:.0f} TFLOP/s, ' if row['operations'] else ''
            cells.append(f'{name} {ms:.4f} ms ({work}{1e-6 * row["moved"] / ms:.0f} GB/s)')
    return f'{row["name"]}: {"; ".join(cells)}; difference from the reference {row["difference"]:.1e}'


def cases(tiny: bool) -> Iterator[Case]:
    """All of them; small ones to try the script."""
    yield from quantize_cases([(32, 256)] if tiny else QUANTIZE)
    yield from product_cases([(32, 256, 256)] if tiny else PRODUCTS)
    yield from grouped_cases([(32, 256, 256, 4)] if tiny else GROUPED)
    yield from by_group_cases([(64, 96, 1024, 4)] if tiny else BY_GROUP)
    yield from expert_cases([(64, 96, 1024, 4)] if tiny else BY_GROUP)
    yield from weight_only_cases([(4, 256, 256)] if tiny else WEIGHT_ONLY)


def main() -> None:
    """Prints a line per operation and shape as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='operations whose name has this in it')
    parser.add_argument('--tiles', action='store_true', help='blockwise products by every tile of the table')
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    options = parser.parse_args()
    about = machine()
    print(', '.join(about.values()))
    on_gpu = jax.default_backend() == 'gpu'
    if options.tiles and not on_gpu:
        parser.error('--tiles compares what only a GPU runs, and there is none here')
    if not on_gpu:
        print('There is no GPU here: these are small shapes and the references, and no measurement of any kernel.')
    rows = []
    for case in cases(options.tiny or not on_gpu):
        if options.only not in case.name or (options.tiles and not case.name.startswith('product')):
            continue
        rows.append(measure(with_tiles(case) if options.tiles else case, 20 if on_gpu else 4, options.repeats))
        print(line(rows[-1]), flush=True)
    wrong = [row['name'] for row in rows if not row['difference'] < LARGEST_DIFFERENCE]
    if options.json:
        print(json.dumps({'benchmark': 'kernels', 'machine': about, 'on_gpu': on_gpu, 'rows': rows}))
    if wrong:
        parser.exit(1, f'{", ".join(wrong)}: a difference of {LARGEST_DIFFERENCE} or more from the reference\n')


if __name__ == '__main__':
    main()
