"""Attention forward and backward beside the dense reference and jax.nn.dot_product_attention, in the same run.

    python benchmarks/attention.py [--batch=8 --length=256 --heads=8 --kv-heads=4 --head-dim=32] [--json]

Times are the best of --repeats calls in milliseconds, on the clock and, for a machine that does other work too, of all
threads together. A row is packed with --documents (1) of equal length; the peers get the same mask. On a GPU cuDNN
joins where it can (plain rows). The last table is decoding: one query per row over a cache.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timing, in_turn, machine

from jpt.kernels.attention import attention


def operands(args: argparse.Namespace) -> tuple[tuple[jax.Array, ...], tuple[np.ndarray, np.ndarray]]:
    """Random q, k, v in --dtype, and positions and segments of packed rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(args.batch, args.length, heads, args.head_dim) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    arrays = tuple(jax.random.normal(key, shape, args.dtype) for key, shape in zip(keys, shapes, strict=True))
    slots = np.tile(np.arange(args.length, dtype=np.int32), (args.batch, 1))
    document = -(-args.length // args.documents)
    return arrays, (slots % document, slots // document + 1)


def ours(implementation: str, plain: bool = False) -> Callable[..., jax.Array]:
    def run(q: Any, k: Any, v: Any, positions: Any, segments: Any) -> jax.Array:
        return attention(
            q,
            k,
            v,
            q_positions_BT=positions,
            k_positions_BS=positions,
            q_segments_BT=segments,
            k_segments_BS=segments,
            scale=q.shape[-1] ** -0.5,
            implementation=implementation,
            plain_rows=plain,
        )

    return run


def jax_nn(q: Any, k: Any, v: Any, positions: Any, segments: Any) -> jax.Array:
    """The peer: XLA's, with a mask where rows are packed."""
    del positions
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def jax_nn_causal(q: Any, k: Any, v: Any, positions: Any, segments: Any) -> jax.Array:
    """The peer without segments: less than was asked for where rows are packed."""
    del positions, segments
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def forward_only(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return function


def both_ways(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output and gradients, the output serving as cotangent."""

    def run(q: Any, k: Any, v: Any, *places: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: function(*arrays, *places), q, k, v)
        return out, pull(out)

    return run


def training(args: argparse.Namespace) -> dict[str, dict[str, Timing]]:
    """Times by implementation and direction."""
    arrays, places = operands(args)
    functions = {'jpt blockwise': ours('blockwise'), 'jpt dense': ours('dense')}
    functions['jax.nn'] = jax_nn if args.documents > 1 else jax_nn_causal
    if jax.default_backend() == 'gpu' and args.documents == 1 and args.dtype == 'bfloat16':
        functions['cuDNN'] = ours('cudnn', plain=True)
    table: dict[str, dict[str, Timing]] = {}
    for direction, wrap in {'forward': forward_only, 'forward and backward': both_ways}.items():
        runs = {name: jax.jit(wrap(function)) for name, function in functions.items()}
        calls = {name: partial(run, *arrays, *places) for name, run in runs.items()}
        for name, timing in in_turn(calls, args.repeats).items():
            table.setdefault(name, {})[direction] = timing
    return table


def decoding(args: argparse.Namespace) -> dict[str, Timing]:
    """One query per row over a cache of --cache slots, half of them used."""
    (q, k, v), _ = operands(argparse.Namespace(**{**vars(args), 'length': args.cache}))
    slots = np.tile(np.arange(args.cache, dtype=np.int32), (args.batch, 1))
    here = np.full((args.batch, 1), args.cache // 2, np.int32)

    def run(implementation: str) -> Callable[..., jax.Array]:
        return jax.jit(
            lambda q, k, v: attention(
                q,
                k,
                v,
                q_positions_BT=here,
                k_positions_BS=slots,
                q_segments_BT=np.ones_like(here),
                k_segments_BS=(slots <= here).astype(np.int32),
                scale=q.shape[-1] ** -0.5,
                implementation=implementation,
            )
        )

    lengths = jnp.asarray(here[:, 0] + 1)
    peer = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths))
    functions: dict[str, Callable[..., Any]] = {'jpt auto': run('auto'), 'jpt blockwise': run('blockwise')}
    functions['jax.nn'] = peer
    first = q[:, :1]
    return in_turn({name: partial(run, first, k, v) for name, run in functions.items()}, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {'batch': 8, 'length': 256, 'heads': 8, 'kv_heads': 4, 'head_dim': 32, 'documents': 1, 'cache': 512}
    for name, default in {**numbers, 'repeats': 20}.items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    table, decode = training(args), decoding(args)
    print(f'{"milliseconds (wall, cpu)":28s}{"forward":>20s}{"forward + backward":>24s}')
    for name, by_direction in table.items():
        cells = [f'{timing.wall_ms:9.2f} {timing.cpu_ms:9.2f}' for timing in by_direction.values()]
        print(f'{name:28s}{cells[0]:>20s}{cells[1]:>24s}')
    for name, timing in decode.items():
        print(f'{"decode " + name:28s}{timing.wall_ms:10.3f} {timing.cpu_ms:9.3f}')
    if args.json:
        sizes = {name: getattr(args, name) for name in (*numbers, 'dtype')}
        times = {name: {way: timing._asdict() for way, timing in ways.items()} for name, ways in table.items()}
        decoded = {name: timing._asdict() for name, timing in decode.items()}
        print(json.dumps({'benchmark': 'attention', **machine(), **sizes, 'training': times, 'decoding': decoded}))


if __name__ == '__main__':
    main()
