"""FP8 training compiled for an H100 without one: which products become what."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from ahead import Dump, compiled, opcodes

from jpt.quant.dot import dot, grouped_dot
from jpt.quant.formats import FORMATS
from jpt.quant.tensors import FakeQuant
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

TOKENS, OUT, IN = (2, 1024), 768, 1280


def step_of(name, gradients):
    """Forward product and both gradients of a bfloat16 layer with float32 masters."""

    def step(x, weight, dy):
        fake = FakeQuant(weight, format=FORMATS[name], gradients=gradients)
        y, pull = jax.vjp(lambda x, fake: dot(x, fake), x, fake)
        return y, pull(dy)

    return step


SHAPES = ((*TOKENS, IN), jnp.bfloat16), ((OUT, IN), jnp.float32), ((*TOKENS, OUT), jnp.bfloat16)


def test_blockwise_products_are_three_kernels(tmp_path, monkeypatch):
    dump = Dump(tmp_path, monkeypatch)
    text = compiled(step_of('fp8_block', 'block'), *SHAPES).as_text()
    codes = dump.code()
    products = [code for code in codes if any('e4m3.e4m3' in name for name in opcodes(code))]
    assert len(products) == 3
    assert len(codes) == 7  # x, dy, and x and dy transposed are each rounded in one pass
    assert ' dot(' not in text
    assert 'cublas' not in text


def test_blockwise_products_of_experts_are_three_kernels(tmp_path, monkeypatch):
    dump = Dump(tmp_path, monkeypatch)

    def step(x, weights, dy, sizes):
        fake = FakeQuant(weights, format=FORMATS['fp8_block'], gradients='block')
        y, pull = jax.vjp(lambda x, fake: grouped_dot(x, fake, sizes), x, fake)
        return y, pull(dy)

    rows, experts = 1920, 8  # other shapes than above: a kernel that was compiled is not written again
    shapes = ((rows, IN), jnp.bfloat16), ((experts, OUT, IN), jnp.float32), ((rows, OUT), jnp.bfloat16)
    text = compiled(step, *shapes, ((experts,), jnp.int32)).as_text()
    codes = dump.code()
    products = [code for code in codes if any('e4m3.e4m3' in name for name in opcodes(code))]
    assert len(products) == 3
    assert len(codes) == 7
    assert ' dot(' not in text
    assert 'cublas' not in text
    # x and dy for the gradient of the weight: whole rows are read, and transposed by tiles.
    turned = [body for body in text.split('\n\n') if re.search(r'ROOT \S+ = bf16\[\d+,\d+\]\{1,0\} transpose', body)]
    assert len([body for body in turned if re.search(r'bf16\[\d+,1,\d+\]\{2,1,0\} gather', body)]) == 2


def test_a_scale_per_tensor_is_three_calls_of_cublaslt():
    text = compiled(step_of('fp8_tensor', 'tensor'), *SHAPES, xla_gpu_enable_triton_gemm=False).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    assert ' dot(' not in text
