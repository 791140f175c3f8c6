"""Blockwise FP8 products compiled for an H100 without one: native instructions, no spills, nothing copied."""

import importlib.util
import os
from functools import partial

import jax.numpy as jnp
import pytest
from ahead import Dump, compiled, opcodes

from jpt.kernels.block_matmul import block_matmul
from jpt.kernels.block_quantize import quantize_rows
from jpt.kernels.block_tiles import TILES
from jpt.kernels.mosaic_block_matmul import product
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

E4M3 = jnp.float8_e4m3fn


def shapes(M, N, K):
    rows, blocks = -(-N // 128), -(-K // 128)
    return ((M, K), E4M3), ((M, blocks), jnp.float32), ((N, K), E4M3), ((rows, blocks), jnp.float32)


def fp8_products(code):
    return [name for name in opcodes(code) if name.startswith('wgmma.mma_async') and name.endswith('.f32.e4m3.e4m3')]


# Large; rows, columns and depth that no tile divides; decoding.
@pytest.mark.parametrize('shape', [(4096, 7168, 16384), (300, 2880, 2880), (1, 576, 7168)])
def test_one_kernel_on_fp8_tensor_cores(shape, tmp_path, monkeypatch):
    dump = Dump(tmp_path, monkeypatch)
    program = compiled(block_matmul, *shapes(*shape))
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 1
    (code,) = dump.code()
    assert fp8_products(code)
    assert {'wgmma.wait_group.sync.aligned', 'fma.rn.f32'} <= opcodes(code)


# What is spilled differs from shape to shape.
@pytest.mark.parametrize('shape', [(4096, 4096, 7168), (2048, 1280, 768)])
@pytest.mark.parametrize('tile', TILES)
def test_every_tile_of_the_table_compiles(tile, shape, tmp_path, monkeypatch):
    """Shared memory beyond the limit is an error of the compiler; results of gradients are float32."""
    dump = Dump(tmp_path, monkeypatch)
    a, a_scale, b, b_scale = shapes(*shape)
    compiled(partial(product, dtype=jnp.bfloat16, tile=tile), a, a_scale, b, b_scale)
    each = ((shape[1], shape[2] // 128), jnp.float32)
    compiled(partial(product, dtype=jnp.float32, tile=tile), a, a_scale, b, each)
    codes = dump.code()
    assert len(codes) == 2
    assert all(map(fp8_products, codes))


def test_scales_go_from_one_kernel_to_the_other_as_they_lie():
    def both(x, b, b_scale):
        return block_matmul(*quantize_rows(x), b, b_scale)

    _, _, b, b_scale = shapes(4096, 4096, 7168)
    text = compiled(both, ((4096, 7168), jnp.bfloat16), b, b_scale).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2
    assert ' fusion(' not in text
    assert ' transpose(' not in text
    assert ' copy(' not in text


@pytest.mark.parametrize('shape', [(4096, 14336, 8192), (300, 2880, 2880), (64, 128, 160)])
def test_a_scale_per_row_of_both(shape, tmp_path, monkeypatch):
    """What gradients of weights are: outputs by inputs, added up over tokens, in float32."""
    dump = Dump(tmp_path, monkeypatch)
    (M, N, K), blocks = shape, -(-shape[2] // 128)
    (a, a_scale), (b, b_scale) = ((((rows, K), E4M3), ((rows, blocks), jnp.float32)) for rows in (M, N))
    compiled(partial(block_matmul, dtype=jnp.float32), a, a_scale, b, b_scale)
    (code,) = dump.code()
    assert fp8_products(code)
