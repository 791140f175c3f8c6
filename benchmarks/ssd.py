"""The state-space scan of Mamba-2, forward and backward, beside transformers' in the same run, and its memory.

    python benchmarks/ssd.py [--batch=2 --length=1024 --heads=8 --width=64 --groups=1 --state=128 --chunks=32] [--json]
    python benchmarks/ssd.py --memory          (compiles only: temporary bytes at 4k, 8k, 16k and 32k tokens)

The peer is the torch expression that transformers runs without the mamba-ssm package (pip install -r
benchmarks/requirements.txt), chunks of 256 as its configs have them, on the CPU; the largest difference of y is printed
beside it. Times are the best of --repeats calls in milliseconds, on the clock and of all threads together. The bound is
that of memory: every operand read and every result written once, at 3.35 TB/s for an H100; on a GPU the share of it
that is reached is printed. Temporary bytes are the compiler's.
"""

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timing, in_turn, machine

from jpt.kernels.causal_conv import causal_conv
from jpt.kernels.ssd import ssd
from jpt.sharding.topology import H100

SIZES = {'batch': 2, 'length': 1024, 'heads': 8, 'width': 64, 'groups': 1, 'state': 128}
CONV_WIDTH = 4
PEER_CHUNK = 256


def operands(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Random operands of the sizes of a layer: steps of 0.001 to 0.1, rates of -1 to -16, as Mamba-2 starts."""
    rng = np.random.default_rng(0)
    rows = (args.batch, args.length)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((*rows, *shape)).astype(np.float32)

    return {
        'x': normal(args.heads, args.width),
        'dt': np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (*rows, args.heads))).astype(np.float32),
        'a': -rng.uniform(1, 16, args.heads).astype(np.float32),
        'b': normal(args.groups, args.state),
        'c': normal(args.groups, args.state),
    }


def cast(args: argparse.Namespace, arrays: dict[str, Any]) -> list[Any]:
    """The operands as a model of --dtype has them: x, b and c in it, dt and a in float32."""
    return [jnp.asarray(v, v.dtype if name in ('dt', 'a') else args.dtype) for name, v in arrays.items()]


def ours(chunk: int | None) -> Callable[..., Any]:
    def run(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
        return ssd(x, dt, a, b, c, jnp.ones(x.shape[:2], jnp.int32), chunk=chunk)[0]

    return run


def both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    """Output and gradients, the output serving as cotangent."""

    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return out, pull(out)

    return run


def peer_runs(args: argparse.Namespace, arrays: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """The same in torch, by direction; nothing where transformers is not installed."""
    try:
        import torch
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        return {}
    logging.getLogger('transformers').setLevel(logging.ERROR)
    tensors = [torch.from_numpy(v).requires_grad_() for v in arrays.values()]

    def forward() -> Any:
        with torch.no_grad():
            return mamba2_chunk_scan(*tensors, chunk_size=PEER_CHUNK).numpy()

    def both() -> Any:
        out = mamba2_chunk_scan(*tensors, chunk_size=PEER_CHUNK)
        return [grad.numpy() for grad in torch.autograd.grad(out, tensors, out.detach())]

    return {'forward': forward, 'forward and backward': both}


def conv_runs(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The convolution of such a layer, both ways: channels of x, b and c together."""
    rng = np.random.default_rng(1)
    channels = args.heads * args.width + 2 * args.groups * args.state
    x = rng.standard_normal((args.batch, args.length, channels)).astype(np.float32)
    kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((channels, CONV_WIDTH), (channels,)))
    segments = jnp.ones(x.shape[:2], jnp.int32)
    run = jax.jit(both_ways(lambda x, kernel, bias: causal_conv(x, kernel, bias, segments)[0]))
    calls: dict[str, Callable[[], Any]] = {'jpt': partial(run, x, kernel, bias)}
    try:
        import torch
    except ImportError:
        return calls
    tensors = [torch.from_numpy(v).requires_grad_() for v in (x, kernel, bias)]

    def both() -> Any:
        wide = torch.nn.functional.pad(tensors[0].transpose(1, 2), (CONV_WIDTH - 1, 0))
        out = torch.nn.functional.conv1d(wide, tensors[1][:, None], tensors[2], groups=channels)
        return [grad.numpy() for grad in torch.autograd.grad(out, tensors, out.detach())]

    return calls | {'torch': both}


def moved_bytes(args: argparse.Namespace, backward: bool) -> int:
    """Bytes of operands and results, each moved once: forward reads all and writes y; backward reads all and dy again
    and writes the gradients."""
    width = jnp.dtype(args.dtype).itemsize
    tokens = args.batch * args.length
    x, steps = tokens * args.heads * args.width * width, tokens * args.heads * 4
    b_and_c = 2 * tokens * args.groups * args.state * width
    forward = 2 * x + steps + b_and_c
    return forward + (3 * x + 2 * steps + 2 * b_and_c if backward else 0)


def times(args: argparse.Namespace) -> dict[str, dict[str, Timing]]:
    """Times by implementation and direction."""
    arrays = operands(args)
    given = cast(args, arrays)
    chunks = [None, *map(int, filter(None, args.chunks.split(',')))]
    peers = peer_runs(args, arrays)
    table: dict[str, dict[str, Timing]] = {}
    for direction, wrap in {'forward': lambda function: function, 'forward and backward': both_ways}.items():
        calls: dict[str, Callable[[], Any]] = {
            f'jpt, chunk {chunk or "chosen"}': partial(jax.jit(wrap(ours(chunk))), *given) for chunk in chunks
        }
        if direction in peers:
            calls['transformers (torch, CPU)'] = peers[direction]
        for name, timing in in_turn(calls, args.repeats).items():
            table.setdefault(name, {})[direction] = timing
    if peers:
        found, wanted = np.asarray(jax.jit(ours(None))(*given), np.float32), peers['forward']()
        print(f'largest difference of y from transformers: {np.abs(found - wanted).max() / np.abs(wanted).max():.1e}')
    return table


def memory(args: argparse.Namespace) -> list[dict[str, int]]:
    """Temporary bytes of value and gradient by length, and those of operands and results."""
    rows = []
    for length in (4096, 8192, 16384, 32768):
        shapes = cast(args, operands(argparse.Namespace(**{**vars(args), 'batch': 1, 'length': length})))
        abstract = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in shapes]
        found: Any = jax.jit(both_ways(ours(None))).lower(*abstract).compile().memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        rows.append({'length': length, 'temporary': found.temp_size_in_bytes, 'operands_and_results': held})
    return rows


def show_times(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the tables of times; what they hold, for --json."""
    table = times(args)
    print(f'{"milliseconds (wall, cpu)":32}{"forward":>22}{"forward and backward":>24}')
    for name, ways in table.items():
        cells = ''.join(f'{timing.wall_ms:12.2f}{timing.cpu_ms:11.2f}' for timing in ways.values())
        print(f'{name:32}{cells}')
    conv = in_turn(conv_runs(args), args.repeats)
    for name, timing in conv.items():
        print(f'{"convolution, " + name:54}{timing.wall_ms:13.2f}{timing.cpu_ms:11.2f}')
    bounds = {}
    for way, backward in {'forward': False, 'forward and backward': True}.items():
        moved = moved_bytes(args, backward)
        bounds[way] = 1e3 * moved / H100.bandwidth
        line = f'{way}: {moved / 2**20:.1f} MiB must move: {bounds[way]:.4f} ms on an H100'
        if jax.default_backend() == 'gpu':
            line += f'; reached {bounds[way] / table["jpt, chunk chosen"][way].wall_ms:.1%} here'
        print(line)
    asdict = {name: {way: timing._asdict() for way, timing in ways.items()} for name, ways in table.items()}
    return {'ssd': asdict, 'conv': {name: timing._asdict() for name, timing in conv.items()}, 'bound_ms': bounds}


def show_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the table of memory; what it holds, for --json."""
    rows = memory(args)
    print(f'{"tokens":>8}{"temporary MiB":>16}{"bytes per token":>18}{"operands and results MiB":>28}')
    for row in rows:
        length, temporary, held = row.values()
        print(f'{length:8,}{temporary / 2**20:16.1f}{temporary / length:18,.0f}{held / 2**20:28.1f}')
    return {'memory': rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**SIZES, 'repeats': 10}.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--chunks', default='', help='further chunks to try, as 32,128')
    parser.add_argument('--memory', action='store_true', help='compile at four lengths, run nothing')
    parser.add_argument('--json', action='store_true', help='print one JSON object as the last line')
    args = parser.parse_args()
    print(', '.join(machine().values()))
    result = show_memory(args) if args.memory else show_times(args)
    if args.json:
        sizes = {name: getattr(args, name) for name in (*SIZES, 'dtype')}
        print(json.dumps({'benchmark': 'ssd', **machine(), **sizes, **result}))


if __name__ == '__main__':
    main()
