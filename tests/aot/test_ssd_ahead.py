"""The state-space scan compiled for H100s that are not here: memory linear in length, nothing gathered. Extra `aot`."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.causal_conv import causal_conv
from jpt.kernels.ssd import ssd
from jpt.sharding.topology import PLUGINS, topology_devices

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

MIB = 2**20
HEADS, WIDTH, GROUPS, STATE = 16, 64, 2, 128


def layer(x, dt, a, b, c, kernel, segments):
    """Convolution of x, scan, and every gradient."""

    def total(x, dt, a, b, c, kernel):
        rows = x.reshape(*x.shape[:2], -1)
        filtered = causal_conv(rows, kernel, None, segments)[0].reshape(x.shape)
        return ssd(filtered, dt, a, b, c, segments)[0].astype(jnp.float32).sum()

    return jax.value_and_grad(total, argnums=range(6))(x, dt, a, b, c, kernel)


def compiled(sizes, batch, length):
    devices = topology_devices(max(1, len(sizes) and jnp.prod(jnp.array(list(sizes.values()))).item()))
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
    rows = 'data' if 'data' in sizes else None
    heads = 'tensor' if 'tensor' in sizes else None
    head, group = P(rows, None, heads), P(rows, None, heads)
    operands = (
        ((batch, length, HEADS, WIDTH), jnp.bfloat16, head),
        ((batch, length, HEADS), jnp.float32, head),
        ((HEADS,), jnp.float32, P(heads)),
        ((batch, length, GROUPS, STATE), jnp.bfloat16, group),
        ((batch, length, GROUPS, STATE), jnp.bfloat16, group),
        ((HEADS * WIDTH, 4), jnp.bfloat16, P(heads)),
        ((batch, length), jnp.int32, P(rows)),
    )
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)) for shape, dtype, spec in operands]
    with jax.set_mesh(mesh):
        return jax.jit(layer).trace(*arrays).lower().compile()


def test_a_long_row_takes_memory_linear_in_its_length():
    """32,768 tokens: a [T, T] array of one head would take 2,048 MiB in bfloat16; x takes 64."""
    temporary = {}
    for length in (8192, 32768):
        program = compiled({'data': 1}, 1, length)
        temporary[length] = program.memory_analysis().temp_size_in_bytes
        sizes = [[int(size) for size in shape.split(',')] for shape in re.findall(r'\[([\d,]+)\]', program.as_text())]
        assert not [size for size in sizes if size.count(length) > 1]
    assert temporary[32768] < 4.1 * temporary[8192]
    assert temporary[32768] < 1024 * MIB


def test_shards_send_gradients_of_shared_leaves_only():
    """Rows over data, heads over tensor: what is summed is as large as a, the kernel and the loss, no activation."""
    program = compiled({'data': 2, 'tensor': 2}, 2, 4096)
    kinds = 'all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all'
    found = re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', program.as_text())
    assert found
    assert {kind for _, kind in found} == {'all-reduce'}
    shapes = [shape for result, _ in found for shape in re.findall(r'\w+\[([\d,]*)\]', result)]
    assert not [shape for shape in shapes if '4096' in shape], shapes
