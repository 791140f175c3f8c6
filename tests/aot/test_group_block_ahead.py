"""Blockwise FP8 products of the rows of each group compiled for an H100 without one."""

import importlib.util
import math
import os
import re
from functools import partial

import jax.numpy as jnp
import pytest
from ahead import Dump, compiled, opcodes

from jpt.kernels.block_tiles import TILES
from jpt.kernels.group_block_product import group_block_product
from jpt.kernels.mosaic_group_block import product
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

E4M3 = jnp.float8_e4m3fn


def operands(O, K, R, E):
    scales = ((O, R // 128), jnp.float32), ((K, R // 128), jnp.float32)
    return ((O, R), E4M3), scales[0], ((K, R), E4M3), scales[1], ((E,), jnp.int32)


# Experts of DeepSeek-V3 and Qwen3-30B-A3B; sides that no tile divides.
@pytest.mark.parametrize('shape', [(4096, 7168, 8192, 8), (768, 2048, 16384, 128), (1860, 2696, 640, 4)])
def test_one_kernel_on_fp8_tensor_cores(shape, tmp_path, monkeypatch):
    O, K, R, E = shape
    dump = Dump(tmp_path, monkeypatch)
    text = compiled(group_block_product, *operands(*shape)).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1
    found = re.findall(r'\w+\[([\d,]+)\]', text)
    assert max(math.prod(map(int, sides.split(','))) for sides in found) == max(E * (O + -O % 8) * K, O * R, K * R)
    (code,) = dump.code()
    assert [name for name in opcodes(code) if name.startswith('wgmma.mma_async') and name.endswith('.f32.e4m3.e4m3')]


@pytest.mark.parametrize('tile', TILES)
def test_every_tile_of_the_table_compiles(tile, tmp_path, monkeypatch):
    dump = Dump(tmp_path, monkeypatch)
    compiled(partial(product, tile=tile), *operands(1280, 768, 2048, 8))
    assert len(dump.code()) == 1
