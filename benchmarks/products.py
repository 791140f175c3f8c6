"""The matrix products of a training step of the quickstart's shapes, alone: XLA's two libraries and torch's.

    python benchmarks/products.py [--shape=teacher] [--repeats=15]

Milliseconds of a step, float32, the best of --repeats, all taking turns; the peer is left out where torch is not
installed. 'ynn' is the library that XLA chooses (YNNPACK), 'eigen' the one it had before. What this means for a step is
in benchmarks/results/cpu.md.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import shapes
from timing import in_turn, machine

from jpt.kernels.head_chunks import choose_chunk
from jpt.quant.dot import dot

TOKENS = 2048
EIGEN: dict[str, str | bool] = {'xla_cpu_experimental_ynn_fusion_type': ''}


def kernels(shape: dict[str, Any]) -> dict[str, list[tuple[int, int, int, int]]]:
    """(rows, in, out, times per step) of every product forward, by part."""
    width, inner, layers = shape['hidden_size'], shape['intermediate_size'], shape['num_hidden_layers']
    heads, kv = (shape[key] * shape['head_dim'] for key in ('num_attention_heads', 'num_key_value_heads'))
    rows = choose_chunk(TOKENS, shape['vocab_size'])
    return {
        'mlp': [(TOKENS, width, inner, 2 * layers), (TOKENS, inner, width, layers)],
        'attention': [(TOKENS, width, heads, layers), (TOKENS, heads, width, layers), (TOKENS, width, kv, 2 * layers)],
        'head': [(rows, width, shape['vocab_size'], TOKENS // rows)],
    }


def both_ways(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
    """The product of a linear layer and its two gradients."""
    y, pull = jax.vjp(dot, x, kernel)
    return y, *pull(dy)


def runs_of(rows: int, width: int, out: int) -> dict[str, Callable[[], Any]]:
    """The same three products by library."""
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(size).astype(np.float32) for size in ((rows, width), (out, width), (rows, out))]
    args = [jnp.asarray(array) for array in arrays]
    lowered = jax.jit(both_ways).lower(*args)
    runs: dict[str, Callable[[], Any]] = {}
    for name, options in (('ynn', None), ('eigen', EIGEN)):
        runs[name] = partial(lowered.compile(compiler_options=options), *args)
    try:
        import torch
    except ImportError:
        return runs
    x, kernel, dy = (torch.from_numpy(array) for array in arrays)
    return runs | {'torch': lambda: (x @ kernel.T, dy @ kernel, dy.T @ x)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', choices=list(shapes()), default='teacher')
    parser.add_argument('--repeats', type=int, default=15)
    options = parser.parse_args()
    print(', '.join(machine().values()))
    total: dict[str, float] = {}
    for part, products in kernels(shapes()[options.shape]).items():
        sums: dict[str, float] = {}
        for *size, times in products:
            for name, best in in_turn(runs_of(*size), options.repeats).items():
                sums[name] = sums.get(name, 0) + times * best.wall_ms
        total = {name: total.get(name, 0) + ms for name, ms in sums.items()}
        print(f'{part:12}' + ''.join(f'{name:>8} {ms:6.0f} ms' for name, ms in sums.items()))
    print(f'{"sum":12}' + ''.join(f'{name:>8} {ms:6.0f} ms' for name, ms in total.items()))


if __name__ == '__main__':
    main()
