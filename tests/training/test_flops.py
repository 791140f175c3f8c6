"""Operations per token against published counts, and against what XLA counts in a compiled step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.quant.lora import FREEZE_ALL_BUT_LORA, add_lora
from jpt.training.flops import flops_per_token, mfu, peak_flops
from jpt.training.freeze import partition


def _config(width=64, heads=4, kv_heads=2, layers=3, mlp=160, vocab=128, window=None, tied=False) -> ModelConfig:
    kind = LayerKind(rope=Rope(), mlp_width=mlp, window=window)
    segments = (Segment((kind,), layers),)
    return ModelConfig('llama', vocab, width, heads, kv_heads, width // heads, segments, 8192, tied=tied)


def _forward(cfg, lengths=16) -> float:
    return flops_per_token(cfg, lengths).forward


def test_published_counts():
    """Megatron-Bridge: 744 TFLOP/s at 14,451 tokens/s for Llama 3 8B; Llama 2 7B at 4,096 has 42.86 GFLOP/token."""
    llama_3_8b = _config(4096, 32, 8, 32, 14336, 128256)
    assert flops_per_token(llama_3_8b, 8192).training == pytest.approx(51.47e9, rel=2e-4)
    assert flops_per_token(llama_3_8b, 8192).training * 14451 == pytest.approx(744e12, rel=1e-3)
    llama_2_7b = _config(4096, 32, 32, 32, 11008, 32000)
    assert flops_per_token(llama_2_7b, 4096).training == pytest.approx(42.86e9, rel=2e-4)


def test_xla_counts_the_same_without_attention():
    """The compiled forward pass, with texts of one token: scores are then [1, 1] and count almost nothing."""
    cfg = dataclasses.replace(_config(layers=1), norm_eps=1e-5)
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((256, 1), jnp.int32)
    compiled = jax.jit(lambda p, t: unembed(cfg, p, forward(cfg, p, t).hidden_BTD)).lower(params, tokens).compile()
    assert compiled.cost_analysis()['flops'] / 256 == pytest.approx(_forward(cfg, 1), rel=0.1)


def test_attention_is_the_area_of_the_mask():
    cfg, windowed = _config(layers=1), _config(layers=1, window=100)
    position = np.arange(1000)
    seen = (position[:, None] >= position) & (position[:, None] - position < 100)
    without = 2 * (64 * (2 * 64 + 2 * 32 + 3 * 160) + 128 * 64)
    assert _forward(cfg, 1000) - without == pytest.approx(4 * 64 * 500)
    assert _forward(windowed, 1000) - without == pytest.approx(4 * 64 * seen.sum(1).mean(), rel=0.01)
    assert _forward(windowed, 100) == _forward(cfg, 100)
    packed = _forward(cfg, [100, 300]) - without
    assert packed == pytest.approx(4 * 64 * (100**2 + 300**2) / 2 / 400)


def test_a_tied_head_counts_as_an_untied_one():
    assert _forward(_config(tied=True)) == _forward(_config())


def _trained(cfg, patterns, lora=False):
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    if lora:
        params = jax.eval_shape(
            lambda params: add_lora(params, jax.random.key(0), ['layers/*/attn/q'], rank=2, alpha=2.0), params
        )
    return partition(params, patterns)[0]


def test_what_is_frozen_needs_no_gradient():
    cfg = _config()
    everything = flops_per_token(cfg, 32)
    assert flops_per_token(cfg, 32, _trained(cfg, [])) == everything
    head = 128 * 64
    only_head = flops_per_token(cfg, 32, _trained(cfg, ['**', '!lm_head']))
    assert only_head.training == everything.forward + 2 * head
    only_norm = flops_per_token(cfg, 32, _trained(cfg, ['**', '!final_norm']))
    assert only_norm.training == everything.forward + 2 * head
    no_mlp = flops_per_token(cfg, 32, _trained(cfg, ['layers/*/mlp']))
    assert no_mlp.training == everything.training - 3 * 2 * 3 * 64 * 160
    lora = flops_per_token(cfg, 32, _trained(cfg, FREEZE_ALL_BUT_LORA, lora=True))
    factors = 3 * 2 * (64 + 64)
    assert lora.forward == everything.forward + 2 * factors
    scores = 3 * 4 * 64 * 16  # backward they count twice, and none of it is for weights
    assert lora.training == 2 * everything.forward + scores + 6 * factors


def test_layers_below_the_lowest_trained_one_get_no_backward_pass():
    kind = LayerKind(rope=Rope(), mlp_width=16)
    cfg = dataclasses.replace(_config(), segments=(Segment((kind,), 2), Segment((kind,), 1)))
    flops = flops_per_token(cfg, 8, _trained(cfg, ['**', '!layers/1.0/attn/q']))
    layer = 2 * 64 * (2 * 64 + 2 * 32 + 3 * 16)
    scores = 4 * 64 * 4
    assert flops.training - flops.forward == layer + 2 * scores + 2 * 128 * 64 + 2 * 64 * 64


def test_utilization_against_the_table_of_peaks():
    assert peak_flops('NVIDIA H100 80GB HBM3') == 989.4e12
    assert peak_flops('NVIDIA H100 PCIe') == 756e12
    assert peak_flops('NVIDIA H200') == 989.4e12
    assert peak_flops('cpu') is None
    # JAX-Toolbox, Llama 2 7B on H100s: 11,362 tokens/s per GPU is 49.2 %.
    flops = flops_per_token(_config(4096, 32, 32, 32, 11008, 32000), 4096).training
    assert mfu(flops, 8 * 11362, 8, 'NVIDIA H100 80GB HBM3') == pytest.approx(0.492, abs=5e-4)
    assert mfu(flops, 100.0, 1, 'cpu') is None
