"""Grouped blockwise FP8 products compiled for an H100 without one."""

import importlib.util
import math
import os
import re
from functools import partial

import jax.numpy as jnp
import pytest
from ahead import Dump, compiled, opcodes

from jpt.kernels.block_tiles import TILES
from jpt.kernels.grouped_block_matmul import grouped_block_matmul
from jpt.kernels.mosaic_grouped_block import product
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

E4M3 = jnp.float8_e4m3fn


# Experts of DeepSeek-V3 and Qwen3-30B-A3B, decoding, an odd number of rows and of steps.
@pytest.mark.parametrize(
    'shape', [(32768, 4096, 7168, 8), (32768, 768, 2048, 128), (64, 768, 2048, 128), (302, 1856, 2688, 4)]
)
def test_one_kernel_on_fp8_tensor_cores(shape, tmp_path, monkeypatch):
    M, N, K, E = shape
    dump = Dump(tmp_path, monkeypatch)
    rows, blocks = -(-N // 128), -(-K // 128)
    a, b = ((M, K), E4M3), ((E, N, K), E4M3)
    scales = ((M, blocks), jnp.float32), ((E, rows, blocks), jnp.float32)
    program = compiled(grouped_block_matmul, a, scales[0], b, scales[1], ((E,), jnp.int32))
    text = program.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1
    found = re.findall(r'\w+\[([\d,]+)\]', text)
    assert max(math.prod(map(int, sides.split(','))) for sides in found) == max(E * N * K, M * K)
    (code,) = dump.code()
    assert [name for name in opcodes(code) if name.startswith('wgmma.mma_async') and name.endswith('.f32.e4m3.e4m3')]


@pytest.mark.parametrize('tile', TILES)
def test_every_tile_of_the_table_compiles(tile, tmp_path, monkeypatch):
    M, N, K, E = 2048, 1280, 768, 8
    dump = Dump(tmp_path, monkeypatch)
    codes = ((M, K), E4M3), ((E, N, K), E4M3)
    scales = ((M, K // 128), jnp.float32), ((E, N // 128, K // 128), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32):
        run = partial(product, dtype=dtype, tile=tile)
        compiled(run, codes[0], scales[0], codes[1], scales[1], ((E,), jnp.int32))
    assert len(dump.code()) == 2
