"""Quantized rows compiled for an H100 without one: one pass, no spills, and no approximate division anywhere."""

import importlib.util
import os
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from ahead import Dump, compiled, opcodes

from jpt.kernels.block_quantize import quantize_gated, quantize_normed, quantize_rows
from jpt.kernels.low_precision import exact_divide
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

SIDES = (8192, 4096)


@pytest.mark.parametrize('scale', ['float32', 'power_of_two'])
def test_rows_are_one_kernel_that_divides_exactly(scale, tmp_path, monkeypatch):
    dump = Dump(tmp_path, monkeypatch)
    program = compiled(partial(quantize_rows, scale=scale), (SIDES, jnp.bfloat16))
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 1
    assert program.memory_analysis().temp_size_in_bytes <= 8192 * 32 * 4 + 1024  # scales, before they are transposed
    (code,) = dump.code()
    found = opcodes(code)
    assert {'cvt.f64.f32', 'rcp.rn.f64', 'mul.f64', 'cvt.rn.f32.f64'} <= found
    assert {'max.NaN.f32', 'cvt.rn.satfinite.e4m3x2.f32'} <= found
    assert not [name for name in found if name.startswith('div') and 'f32' in name]


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_other_dtypes_and_the_fused_forms_compile(dtype, tmp_path, monkeypatch):
    dump = Dump(tmp_path, monkeypatch)

    def all_forms(x, up, weight):
        return quantize_rows(x), quantize_gated(x, up), quantize_normed(x, weight, 1e-5)

    program = compiled(all_forms, ((203, 352), dtype), ((203, 352), dtype), ((352,), jnp.float32))
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert len(dump.code()) == 3


def xla_code(function, *shapes, folder):
    """The instructions of XLA's own kernels."""
    # jax 0.10 writes them with all else that is dumped, 0.12 with what its emitters write.
    newer = {} if jax.__version__.startswith('0.10.') else {'xla_dump_emitter_re': '.*'}
    compiled(function, *shapes, xla_dump_to=str(folder), **newer)
    codes = [path.read_text() for path in folder.glob('*.ptx')]
    assert codes
    return set().union(*map(opcodes, codes))


def test_xla_divides_exactly_only_in_float64(tmp_path):
    """Why exact_divide is what it is: XLA's division of float32 on GPUs is approximate, with every kind of divisor."""
    shapes = ((256, 512), jnp.float32), ((256, 1), jnp.float32)

    def chosen(x, divisor):
        return x / jnp.where(x == x, divisor, 1)

    def exact(x, divisor):
        return exact_divide(x, divisor), exact_divide(divisor, 448.0)

    found = xla_code(exact, *shapes, folder=tmp_path / 'exact')
    assert {'cvt.f64.f32', 'mul.rn.f64', 'cvt.rn.f32.f64'} <= found
    assert not [name for name in found if name.startswith(('div', 'rcp')) and 'f32' in name]
    assert 'div.full.f32' in xla_code(chosen, *shapes, folder=tmp_path / 'chosen')
