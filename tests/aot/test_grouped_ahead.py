"""Grouped products compiled for an H100 without one: which kernels, what memory, which instructions."""

import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.grouped_matmul import grouped_matmul
from jpt.sharding.topology import PLUGINS, topology_devices

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

M, K, O, E = 8192, 2048, 768, 64


def compiled(implementation, dtype, rows=M, widths=(O, K), backward=True):
    """Value and gradients (with `backward`) of a grouped product of bfloat16 rows."""
    mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,), devices=topology_devices(1))

    def step(x, kernels, sizes, dy):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, kernels)
        return (y, *pull(dy)) if backward else y

    x, dy = ((rows, width) for width in reversed(widths))
    shapes = (x, jnp.bfloat16), ((E, *widths), dtype), ((E,), jnp.int32), (dy, jnp.bfloat16)
    operands = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P())) for shape in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(step).trace(*operands).lower().compile()


def largest(program):
    """Elements of the largest array that the program names."""
    shapes = re.findall(r'\w+\[([\d,]+)\]', program.as_text())
    return max(math.prod(map(int, shape.split(','))) for shape in shapes)


def kernels_of(program):
    return len(re.findall(r'custom_call_target="mosaic_gpu', program.as_text()))


# Other rows for other kernels: a kernel that this process has compiled before is not written out again.
@pytest.mark.parametrize(('dtype', 'rows'), [(jnp.bfloat16, M), (jnp.float32, 2 * M)])
def test_value_and_gradient_are_three_kernels_on_tensor_cores(dtype, rows, tmp_path, monkeypatch):
    """Nothing is larger than the kernels of all groups, and nothing spills; the dense form has [M, E * K]."""
    monkeypatch.setenv('MOSAIC_GPU_DUMP_TO', str(tmp_path))
    monkeypatch.setenv('MOSAIC_GPU_DUMP_PTX', '1')
    monkeypatch.setenv('MOSAIC_GPU_DUMP_PTXAS', '1')
    program = compiled('auto', dtype, rows)
    assert kernels_of(program) == 3
    assert largest(program) == E * O * K < rows * E * K
    cast = 0 if dtype == jnp.bfloat16 else 2 * E * O * K  # float32 kernels in bfloat16
    assert program.memory_analysis().temp_size_in_bytes < cast + 2 * rows * (O + K) + 2**20
    code = [path.read_text() for path in tmp_path.glob('*.ptx')]
    assert len(code) == 3
    assert all('wgmma.mma_async' in text and '.bf16.bf16' in text for text in code)
    reports = ''.join(path.read_text() for path in tmp_path.glob('*.ptxas'))
    assert re.findall(r'(\d+) bytes spill', reports) == ['0'] * 6


@pytest.mark.parametrize(
    ('rows', 'widths'), [(32, (2880, 2880)), (300, (256, 128)), (64, (2048, 1408)), (256, (14336, 4096))]
)
def test_a_few_rows_and_uneven_widths_compile(rows, widths):
    """Decoding, and widths that no block of 128 or 256 columns divides."""
    program = compiled('auto', jnp.bfloat16, rows, widths)
    assert kernels_of(program) == 3
    assert largest(program) == E * math.prod(widths)


def test_tiles_hold_no_dense_operand_either():
    program = compiled('tiles', jnp.bfloat16)
    assert kernels_of(program) == 0
    assert largest(program) == E * O * K


def test_xla_makes_the_ragged_product_dense():
    """Why there are kernels at all: this fails on the day that lax.ragged_dot no longer needs a peer."""
    assert largest(compiled('ragged', jnp.bfloat16, backward=False)) >= M * E * K
