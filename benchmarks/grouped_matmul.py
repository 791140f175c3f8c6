"""Grouped products of experts beside lax.ragged_dot and torch, in the same run.

    python benchmarks/grouped_matmul.py [--only=decode] [--dtype=float32] [--repeats=20] [--json]

Milliseconds of a call (best of --repeats, all taking turns) and useful operations per second: 2 M K O, times three with
the gradients of rows and kernels. On CPU the shapes are those of tiny models, torch's peer is a loop over the experts
and every product is also measured with a single kernel for all rows ('one kernel'): what grouping costs. On a GPU the
shapes are those of Qwen3-30B-A3B and Mixtral, torch's peer is torch._grouped_mm, and the last column is the roofline
of an H100: the longer of the operations at their peak and the bytes that must be read and written once.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn, machine

from jpt.kernels.grouped_matmul import choose_implementation, grouped_matmul
from jpt.sharding.topology import H100

RAGGED_BYTES = 2**30  # of the dense operand that lax.ragged_dot makes: larger ones are left out


class Shape(NamedTuple):
    """Rows, width in, width out and groups of a product; rows fall to groups unevenly, some get none."""

    rows: int
    width: int
    out: int
    groups: int


CPU = {
    'tiny, 8 experts': Shape(2048, 128, 256, 8),
    'tiny, 32 experts': Shape(8192, 128, 128, 32),
    'small, 128 experts': Shape(16384, 256, 128, 128),
    'small, wide': Shape(4096, 256, 512, 64),
    'few and large': Shape(8192, 512, 512, 8),
    'decode 8 of 32': Shape(8, 128, 128, 32),
    'decode 32 of 128': Shape(32, 256, 128, 128),
    'decode 16 of 64': Shape(16, 512, 512, 64),
}
GPU = {
    # 8 rows of 4,096 tokens, 8 experts each, over 8 GPUs: all experts on each, or 16 of the 128.
    'Qwen3-30B-A3B up': Shape(32768, 2048, 768, 128),
    'Qwen3-30B-A3B down': Shape(32768, 768, 2048, 128),
    'Qwen3-30B-A3B up, 16 local': Shape(32768, 2048, 768, 16),
    'Qwen3-30B-A3B up, decode 64': Shape(512, 2048, 768, 128),
    'Mixtral-8x7B up': Shape(16384, 4096, 14336, 8),
}


def operands(shape: Shape, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """x, kernels, sizes and dy; the shares of the groups are drawn from a Dirichlet distribution of concentration 2."""
    random = np.random.default_rng(0)
    sizes = random.multinomial(shape.rows, random.dirichlet(np.full(shape.groups, 2.0))).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    sides = [(shape.rows, shape.width), (shape.groups, shape.out, shape.width), (shape.rows, shape.out)]
    x, kernels, dy = (jax.random.normal(key, side, dtype) for key, side in zip(keys, sides, strict=True))
    return x, kernels, jnp.asarray(sizes), dy


def wrapped(function: Callable[..., jax.Array], backward: bool) -> Callable[..., Any]:
    """Jitted: the product, with its two gradients if asked for."""

    def run(x: Any, kernels: Any, sizes: Any, dy: Any) -> Any:
        if not backward:
            return function(x, kernels, sizes)
        y, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, kernels)
        return y, pull(dy)

    return jax.jit(run)


def ragged(x: Any, kernels: Any, sizes: Any) -> jax.Array:
    return jax.lax.ragged_dot(x, kernels.swapaxes(1, 2), sizes)


def one_kernel(x: Any, kernels: Any, sizes: Any) -> jax.Array:
    del sizes
    return jax.lax.dot_general(x, kernels[0], (((1,), (1,)), ((), ())))


def torch_run(x: Any, kernels: Any, sizes: Any, dy: Any, backward: bool) -> Callable[[], Any] | None:
    """The peer with its operands, or None where torch is not installed or has no grouped product for this."""
    try:
        import torch
    except ImportError:
        return None
    ends = np.cumsum(np.asarray(sizes))
    x, kernels, dy = (torch.from_numpy(np.array(array, np.float32)) for array in (x, kernels, dy))
    if jax.default_backend() == 'gpu':
        if not hasattr(torch, '_grouped_mm') or not torch.cuda.is_available():
            return None
        x, kernels, dy = (array.cuda().bfloat16() for array in (x, kernels, dy))
        offsets = torch.from_numpy(ends.astype(np.int32)).cuda()

        def grouped() -> Any:
            y = torch._grouped_mm(x, kernels.transpose(1, 2), offs=offsets)
            if not backward:
                return y
            return y, torch._grouped_mm(dy, kernels, offs=offsets), torch._grouped_mm(dy.T, x, offs=offsets)

        return grouped
    spans = [
        (e, slice(end - size, end)) for e, (size, end) in enumerate(zip(np.asarray(sizes), ends, strict=True)) if size
    ]

    def loop() -> Any:
        y = torch.empty_like(dy)
        for e, own in spans:
            torch.mm(x[own], kernels[e].T, out=y[own])
        if not backward:
            return y
        dx, dkernels = torch.empty_like(x), torch.zeros_like(kernels)
        for e, own in spans:
            torch.mm(dy[own], kernels[e], out=dx[own])
            torch.mm(dy[own].T, x[own], out=dkernels[e])
        return y, dx, dkernels

    return loop


def repeated(run: Callable[[], Any], times: int) -> Callable[[], Any]:
    """The same call several times over, waited for once."""

    def runs() -> Any:
        for _ in range(times - 1):
            run()
        out = run()
        if jax.default_backend() == 'gpu' and not isinstance(jax.tree.leaves(out)[0], jax.Array):
            import torch

            torch.cuda.synchronize()
        return out if isinstance(jax.tree.leaves(out)[0], jax.Array) else None

    return runs


def measured(shape: Shape, dtype: str, backward: bool, repeats: int) -> dict[str, float]:
    """Milliseconds by implementation."""
    arrays = operands(shape, dtype)
    chosen = choose_implementation(*arrays[:2])
    functions: dict[str, Callable[..., jax.Array]] = {f'jpt {chosen}': grouped_matmul}
    if chosen != 'tiles':
        functions['jpt tiles'] = partial(grouped_matmul, implementation='tiles')
    if shape.rows * shape.width * shape.groups * jnp.dtype(dtype).itemsize <= RAGGED_BYTES:
        functions['lax.ragged_dot'] = ragged
    functions['one kernel'] = one_kernel
    runs: dict[str, Callable[[], Any]] = {
        name: partial(wrapped(function, backward), *arrays) for name, function in functions.items()
    }
    x, kernels, sizes, dy = arrays
    peer = torch_run(x, kernels, sizes, dy, backward)
    if peer is not None:
        runs['torch'] = peer
    times = 10 if jax.default_backend() == 'gpu' else 1
    timings = in_turn({name: repeated(run, times) for name, run in runs.items()}, repeats)
    return {name: timing.wall_ms / times for name, timing in timings.items()}


def roofline(shape: Shape, backward: bool) -> float:
    """Milliseconds on an H100 in bfloat16; of the kernels only those that have rows are read, at most one per row."""
    products = 3 if backward else 1
    kernels = min(shape.groups, shape.rows) * shape.width * shape.out
    moved = products * 2 * (shape.rows * (shape.width + shape.out) + kernels)
    return 1e3 * max(products * 2 * shape.rows * shape.width * shape.out / H100.bfloat16, moved / H100.bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = jax.default_backend() == 'gpu'
    parser.add_argument('--only', default='', help='shapes whose name has this in it')
    parser.add_argument('--dtype', default='bfloat16' if on_gpu else 'float32')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    rows = []
    for name, shape in (GPU if on_gpu else CPU).items():
        if args.only not in name:
            continue
        for backward in (False, True):
            times = measured(shape, args.dtype, backward, args.repeats)
            work = (3 if backward else 1) * 2e-6 * shape.rows * shape.width * shape.out
            cells = [f'{peer} {ms:.3f} {work / ms:.1f}' for peer, ms in times.items()]
            bound = roofline(shape, backward) if on_gpu else None
            cells += [f'roofline {bound:.3f}'] if bound else []
            way = 'both ways' if backward else 'forward'
            print(f'{name} {tuple(shape)} {way} (ms, GFLOP/s): {", ".join(cells)}', flush=True)
            rows.append({'name': name, **shape._asdict(), 'backward': backward, 'ms': times, 'roofline_ms': bound})
    if args.json:
        print(json.dumps({'benchmark': 'grouped_matmul', **machine(), 'dtype': args.dtype, 'rows': rows}))


if __name__ == '__main__':
    main()
