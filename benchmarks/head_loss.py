"""The fused head loss beside the plain one that writes all logits, its bare matrix products, and torch if it is there.

    python benchmarks/head_loss.py [--tokens=2048 --width=256 --vocab=4096 --chunks=256,512,1024] [--json]
    python benchmarks/head_loss.py --memory [--chunks=256,512] [--json]

Loss and both gradients, cross-entropy (plain: optax) and distillation from full teacher logits (plain: two softmaxes).
Of torch the loss is taken naively, and in chunks of --torch_chunk tokens that are computed again going back.
Times are the best of --repeats calls in milliseconds, on the clock and, for a machine that does other work too, of all
threads together. Temporary bytes are the compiler's. The floor is the three products without which there is no gradient
(four for distillation, with the teacher's logits).

With --memory it is compiled for an H100 that is not there (extra `aot`), at the size of a real head: 8,192 tokens,
width 4,096, 131,072 words, in bfloat16; from the 64 likeliest words of a teacher, and from its head (JSD). Outputs are
loss and both gradients, the kernel's in the dtype that is named.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from timing import in_turn, machine
from torch_heads import torch_runs

from jpt.kernels.distillation_loss import distillation
from jpt.kernels.divergences import Divergence
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.sparse_target import SparseTarget
from jpt.kernels.token_losses import TokenLoss, cross_entropy
from jpt.sharding.topology import topology_devices


def operands(args: argparse.Namespace) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key: jax.Array, rows: int) -> jax.Array:
        return (2 * args.width**-0.25 * jax.random.normal(key, (rows, args.width))).astype(args.dtype)

    return {
        'hidden': normal(keys[0], args.tokens),
        'kernel': normal(keys[1], args.vocab),
        'weights': jnp.full(args.tokens, 1 / args.tokens),
        'targets': jax.random.randint(keys[2], (args.tokens,), 0, args.vocab),
        'teacher_hidden': normal(keys[3], args.tokens),
        'teacher_kernel': normal(keys[4], args.vocab),
    }


def logits_of(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(hidden, kernel.T, preferred_element_type=jnp.float32)


def plain_ce(hidden: Any, kernel: Any, weights: Any, targets: Any, **_: Any) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(hidden, kernel), targets)
    return jnp.sum(weights * losses)


def plain_kl(hidden: Any, kernel: Any, weights: Any, teacher_hidden: Any, teacher_kernel: Any, **_: Any) -> jax.Array:
    logp = jax.nn.log_softmax(logits_of(hidden, kernel))
    teacher = jax.nn.log_softmax(logits_of(teacher_hidden, teacher_kernel))
    return jnp.sum(weights * jnp.sum(jnp.exp(teacher) * (teacher - logp), axis=-1))


def fused(loss: Any, chunk: int | None) -> Any:
    def run(hidden: Any, kernel: Any, weights: Any, targets: Any, teacher_hidden: Any, teacher_kernel: Any) -> Any:
        args, shared = {'targets': targets, 'teacher_hidden': teacher_hidden}, {'teacher_kernel': teacher_kernel}
        return linear_loss(hidden, kernel, weights, args, loss, shared=shared, vocab_size=kernel.shape[0], chunk=chunk)[
            0
        ]

    return run


def products(teacher: bool) -> Any:
    """The matrix products alone."""

    def run(hidden: Any, kernel: Any, teacher_hidden: Any, teacher_kernel: Any, **_: Any) -> Any:
        logits = logits_of(hidden, kernel).astype(hidden.dtype)
        if teacher:
            logits += logits_of(teacher_hidden, teacher_kernel).astype(hidden.dtype)
        return jnp.dot(logits, kernel), jnp.dot(logits.T, hidden)

    return run


def with_gradients(loss: Any) -> Any:
    return lambda hidden, kernel, **rest: jax.value_and_grad(
        lambda hidden, kernel: loss(hidden=hidden, kernel=kernel, **rest), argnums=(0, 1)
    )(hidden, kernel)


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds and temporary MiB by name."""
    arrays = operands(args)
    chunks = [None, *(int(chunk) for chunk in args.chunks.split(',') if chunk)]
    functions: dict[str, Callable[..., Any]] = {}
    for name, plain, loss in (('ce', plain_ce, cross_entropy()), ('kl', plain_kl, distillation())):
        functions[f'{name} products only'] = products(teacher=name == 'kl')
        functions[f'{name} plain'] = with_gradients(plain)
        for chunk in chunks:
            functions[f'{name} fused, chunk {chunk or "auto"}'] = with_gradients(fused(loss, chunk))
    compiled = {name: jax.jit(function).lower(**arrays).compile() for name, function in functions.items()}
    peers = torch_runs(arrays, args.dtype, args.torch_chunk)
    times = in_turn({name: partial(run, **arrays) for name, run in compiled.items()} | peers, args.repeats)
    temporary = {
        name: getattr(run.memory_analysis(), 'temp_size_in_bytes', 0) / 2**20 for name, run in compiled.items()
    }
    return {name: {**times[name]._asdict(), 'temp_mib': round(temporary.get(name, float('nan')), 1)} for name in times}


def memory(chunks: list[int | None]) -> dict[str, dict[str, float]]:
    """Temporaries and outputs in MiB by case, compiled for one H100."""
    tokens, width, vocab, words = 8192, 4096, 131072, 64
    devices = topology_devices(1)
    place = SingleDeviceSharding(devices[0])

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def compiled(loss: TokenLoss, dtype: str, chunk: int | None, args: Any, shared: Any) -> Any:
        def total(hidden: Any, kernel: Any, weights: Any, args: Any, shared: Any) -> Any:
            return linear_loss(hidden, kernel, weights, args, loss, shared=shared, vocab_size=vocab, chunk=chunk)[0]

        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        hidden, kernel = array((tokens, width), 'bfloat16'), array((vocab, width), dtype)
        with jax.set_mesh(jax.make_mesh((1,), ('data',), devices=devices)):
            return step.trace(hidden, kernel, array((tokens,), 'float32'), args, shared).lower().compile()

    sparse = SparseTarget(array((tokens, words), 'int32'), array((tokens, words), 'float32'))
    targets = {'targets': array((tokens,), 'int32')}
    hidden, head = array((tokens, width), 'bfloat16'), array((vocab, width), 'bfloat16')
    cases = {
        'sparse': (distillation(form='tail'), targets | {'sparse_target': sparse}, None),
        'jsd': (
            distillation((1.0, Divergence('jsd'))),
            targets | {'teacher_hidden': hidden},
            {'teacher_kernel': head},
        ),
    }
    table = {}
    for name, (loss, args, shared) in cases.items():
        for dtype in ('bfloat16', 'float32'):
            for chunk in chunks:
                found = compiled(loss, dtype, chunk, args, shared).memory_analysis()
                sizes = {'temporaries_mib': found.temp_size_in_bytes, 'outputs_mib': found.output_size_in_bytes}
                case = f'{name}, {dtype} dW, chunk {chunk or "auto"}'
                table[case] = {key: round(size / 2**20, 1) for key, size in sizes.items()}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {'tokens': 2048, 'width': 256, 'vocab': 4096}
    for name, default in {**numbers, 'repeats': 10}.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--chunks', default='256,512,1024')
    parser.add_argument('--torch_chunk', type=int, default=512)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--memory', action='store_true', help='compile for an H100 instead, and print what it holds')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    if args.memory:
        held = memory([int(chunk) if chunk else None for chunk in args.chunks.split(',')])
        for name, row in held.items():
            print(f'{name:36s}' + '  '.join(f'{key} {value:8.1f}' for key, value in row.items()))
        if args.json:
            print(json.dumps({'benchmark': 'head_loss_memory', 'jax': jax.__version__, 'results': held}))
        return
    table = measure(args)
    print(f'{"":28s}{"wall ms":>10s}{"cpu ms":>10s}{"temp MiB":>10s}')
    for name, row in table.items():
        print(f'{name:28s}{row["wall_ms"]:10.1f}{row["cpu_ms"]:10.1f}{row["temp_mib"]:10.1f}')
    if args.json:
        sizes = {name: getattr(args, name) for name in (*numbers, 'dtype')}
        print(json.dumps({'benchmark': 'head_loss', **machine(), **sizes, 'results': table}))


if __name__ == '__main__':
    main()
