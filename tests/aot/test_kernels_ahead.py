"""What the kernels become on an H100, compiled without one: memory, cuDNN calls, collectives. Extra `aot`; .ci/run."""

import ctypes
import importlib.util
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.aligned_loss import AlignedTarget, aligned_distillation
from jpt.kernels.attention import attention
from jpt.kernels.distillation_loss import distillation
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.sparse_target import SparseTarget
from jpt.kernels.token_losses import cross_entropy
from jpt.sharding.topology import PLUGINS, topology_devices

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

MIB = 2**20


def mesh_of(sizes):
    devices = topology_devices(int(jnp.prod(jnp.array(list(sizes.values())))))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def compiled(mesh, function, *operands):
    """`function` compiled for abstract operands (shape, dtype, spec)."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in operands]
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arrays).lower().compile()


def temporary(program):
    return program.memory_analysis().temp_size_in_bytes / MIB


def collectives(program):
    """(operation, shape) of every collective of the program."""
    kinds = 'all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all'
    pattern = rf'= \(*(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\('
    return {(name, shape) for shape, name in re.findall(pattern, program.as_text())}


def test_head_loss_holds_one_chunk_of_logits():
    """8,192 tokens, width 4,096, 131,072 words: all logits would take 12,288 MiB, the float32 gradient takes 2,048."""
    tokens, width, words = 8192, 4096, 131072

    def step(hidden, kernel, weights, targets):
        def total(hidden, kernel):
            return linear_loss(hidden, kernel, weights, {'targets': targets}, cross_entropy(), vocab_size=words)[0]

        return jax.value_and_grad(total, argnums=(0, 1))(hidden, kernel)

    operands = (
        ((tokens, width), jnp.bfloat16, P()),
        ((words, width), jnp.bfloat16, P()),
        ((tokens,), jnp.float32, P()),
        ((tokens,), jnp.int32, P()),
    )
    program = compiled(mesh_of({'data': 1}), step, *operands)
    assert temporary(program) < 2560

    def frozen(hidden, kernel, weights, targets):
        return step(hidden, kernel, weights, targets)[1][0]

    assert temporary(compiled(mesh_of({'data': 1}), frozen, *operands)) < 1024, 'a frozen head needs no gradient'


@pytest.mark.parametrize(
    ('dtype', 'most', 'biased'), [('bfloat16', 3392, False), ('float32', 3700, False), ('bfloat16', 3392, True)]
)
def test_distillation_from_likely_words_holds_little_beside_its_gradients(dtype, most, biased):
    """64 words of 131,072 for 8,192 tokens: MiB of temporaries and outputs, whatever dW is held in."""
    tokens, width, words, likely = 8192, 4096, 131072, 64

    def step(hidden, kernel, weights, targets, ids, logp, bias):
        def total(hidden, kernel, bias):
            args, loss = {'targets': targets, 'sparse_target': SparseTarget(ids, logp)}, distillation(form='tail')
            own = bias if biased else None
            return linear_loss(hidden, kernel, weights, args, loss, vocab_size=words, bias_V=own)[0]

        return jax.value_and_grad(total, argnums=(0, 1, 2) if biased else (0, 1))(hidden, kernel, bias)

    program = compiled(
        mesh_of({'data': 1}),
        step,
        ((tokens, width), jnp.bfloat16, P()),
        ((words, width), jnp.dtype(dtype), P()),
        ((tokens,), jnp.float32, P()),
        ((tokens,), jnp.int32, P()),
        ((tokens, likely), jnp.int32, P()),
        ((tokens, likely), jnp.float32, P()),
        ((words,), jnp.float32, P()),
    )
    assert temporary(program) + program.memory_analysis().output_size_in_bytes / MIB <= most


def test_sorted_differences_of_two_vocabularies_fit_beside():
    """A teacher with another tokenizer, 64 of its words for 8,192 tokens, and 64 of the student's 131,072 by rank."""
    tokens, width, words, likely = 8192, 4096, 131072, 64

    def step(hidden, kernel, weights, targets, ids, logp, lacking):
        def total(hidden, kernel):
            target = AlignedTarget(SparseTarget(ids, logp), logp, weights)
            args, loss = {'targets': targets, 'aligned_target': target}, aligned_distillation(distillation(form='tail'))
            return linear_loss(hidden, kernel, weights, args, loss, shared={'lacking': lacking}, vocab_size=words)[0]

        return jax.value_and_grad(total, argnums=(0, 1))(hidden, kernel)

    program = compiled(
        mesh_of({'data': 1}),
        step,
        ((tokens, width), jnp.bfloat16, P()),
        ((words, width), jnp.bfloat16, P()),
        ((tokens,), jnp.float32, P()),
        ((tokens,), jnp.int32, P()),
        ((tokens, likely), jnp.int32, P()),
        ((tokens, likely), jnp.float32, P()),
        ((words, 1), jnp.bool_, P()),
    )
    assert temporary(program) + program.memory_analysis().output_size_in_bytes / MIB <= 3392


def test_head_loss_over_tensor_gathers_no_vocabulary():
    words, width = 50304, 512

    def step(hidden, kernel, weights, targets):
        def total(hidden, kernel):
            return linear_loss(hidden, kernel, weights, {'targets': targets}, cross_entropy(), vocab_size=50257)[0]

        return jax.value_and_grad(total, argnums=(0, 1))(hidden, kernel)

    program = compiled(
        mesh_of({'fsdp': 2, 'tensor': 4}),
        step,
        ((4096, width), jnp.bfloat16, P('fsdp')),
        ((words, width), jnp.bfloat16, P('tensor')),
        ((4096,), jnp.float32, P('fsdp')),
        ((4096,), jnp.int32, P('fsdp')),
    )
    found = collectives(program)
    assert found
    assert not [shape for name, shape in found if name == 'all-gather' and ('50304' in shape or '12576,512' in shape)]
    assert not [shape for name, shape in found if name == 'all-to-all']


def attention_step(**options):
    def step(q, k, v, positions, segments):
        places = {'q_positions_BT': positions, 'k_positions_BS': positions}
        places.update(q_segments_BT=segments, k_segments_BS=segments)

        def total(q, k, v):
            return attention(q, k, v, **places, scale=0.125, **options).astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    return step


WHOLE = P()


def attention_operands(batch, length, heads, kv_heads, rows=WHOLE, split=WHOLE):
    return (
        ((batch, length, heads, 64), jnp.bfloat16, split),
        ((batch, length, kv_heads, 64), jnp.bfloat16, split),
        ((batch, length, kv_heads, 64), jnp.bfloat16, split),
        ((batch, length), jnp.int32, rows),
        ((batch, length), jnp.int32, rows),
    )


def load_cudnn():
    """The loader of cuDNN, from NVIDIA's package; JAX asks for its version when it compiles."""
    spec = importlib.util.find_spec('nvidia.cudnn_jit') or importlib.util.find_spec('nvidia.cudnn')
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip('cuDNN is not installed (nvidia-cudnn-jit-cu13)')
    ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / 'lib' / 'libcudnn.so.9'), mode=ctypes.RTLD_GLOBAL)


@pytest.mark.parametrize('window', [None, 1024])
def test_plain_rows_go_to_cudnn_on_every_shard(window):
    load_cudnn()
    program = compiled(
        mesh_of({'data': 2, 'tensor': 2}),
        attention_step(plain_rows=True, window=window),
        *attention_operands(4, 4096, 8, 4, P('data'), P('data', None, 'tensor')),
    )
    text = program.as_text()
    assert '__cudnn$fmhaSoftmaxBackward' in text
    assert not [name for name, _ in collectives(program) if name != 'all-reduce'], 'operands must stay where they are'


def test_packed_rows_go_blockwise_in_memory_linear_in_length():
    """One row of 32,768 tokens: a score array would take 8 x 32,768^2 x 4 bytes = 32 GiB."""
    program = compiled(mesh_of({'data': 1}), attention_step(), *attention_operands(1, 32768, 8, 4))
    assert '__cudnn' not in program.as_text()
    assert temporary(program) < 1024


def test_ring_passes_keys_on_and_gathers_nothing():
    program = compiled(
        mesh_of({'context': 4}),
        attention_step(context='ring'),
        *attention_operands(1, 8192, 4, 2, P(None, 'context'), P(None, 'context')),
    )
    names = {name for name, _ in collectives(program)}
    assert 'collective-permute' in names
    assert 'all-gather' not in names
