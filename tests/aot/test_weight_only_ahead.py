"""Products with a weight in 8 bits compiled for an H100 without one: the weight is never written in 16."""

import importlib.util
import os

import jax.numpy as jnp
import pytest
from ahead import Dump, compiled, opcodes

from jpt.kernels.weight_only_matmul import weight_only_matmul
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)


def operands(M, N, K):
    scales = -(-N // 128), -(-K // 128)
    return ((M, K), jnp.bfloat16), ((N, K), jnp.float8_e4m3fn), (scales, jnp.float32)


@pytest.mark.parametrize('shape', [(1, 4096, 14336), (16, 14336, 4096), (64, 24576, 4096), (5, 584, 2880)])
def test_one_kernel_that_reads_one_byte_per_weight(shape, tmp_path, monkeypatch):
    M, N, K = shape
    dump = Dump(tmp_path, monkeypatch)
    program = compiled(weight_only_matmul, *operands(*shape))
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 1
    # An eighth of the weight for parts of the result, or, where K has one part, the result in float32.
    assert program.memory_analysis().temp_size_in_bytes <= max(N * K / 8, 4 * N * -(-M // 8) * 8) + 2**17
    (code,) = dump.code()
    found = opcodes(code)
    assert [name for name in found if name.startswith('wgmma.mma_async') and name.endswith('.f32.bf16.bf16')]
    assert {'cvt.rn.f16x2.e4m3x2', 'cvt.rn.bf16x2.f32'} <= found


def test_xla_writes_the_weight_in_16_bits():
    """Why there is a kernel: this fails on the day that XLA no longer does."""
    M, N, K = 16, 14336, 4096

    def dequantized(x, codes, scale):
        wide = codes.astype(jnp.bfloat16) * jnp.repeat(jnp.repeat(scale, 128, 0), 128, 1).astype(jnp.bfloat16)
        return x @ wide.T

    assert compiled(dequantized, *operands(M, N, K)).memory_analysis().temp_size_in_bytes >= 2 * N * K
