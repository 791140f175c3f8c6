"""Operations per token against published counts, and against the products that traced programs hold."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.kernels import grouped_matmul
from jpt.models.config import Compute, Experts, LayerKind, ModelConfig, Rope, Segment, StateSpace
from jpt.models.families import config_from_hf
from jpt.models.transformer import forward, init, unembed
from jpt.quant.lora import FREEZE_ALL_BUT_LORA, add_lora
from jpt.training.flops import flops_per_token, mfu, peak_flops
from jpt.training.freeze import partition


def _config(width=64, heads=4, kv_heads=2, layers=3, mlp=160, vocab=128, tied=False, **places) -> ModelConfig:
    kind = LayerKind(rope=Rope(), mlp_width=mlp, **places)
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


GOLDEN = Path(__file__).parents[1] / 'golden'
PUBLISHED = json.loads((GOLDEN / 'published_configs.json').read_text())


@pytest.mark.parametrize(
    ('name', 'kernels', 'places'),
    [
        # Parameters that a token meets, without the embedding (151,936 x 2,048) and the norms.
        ('Qwen3-30B-A3B', 3_353_032_704 - 151936 * 2048 - 48 * (2 * 2048 + 2 * 128) - 2048, 48 * 2 * 32 * 128),
        # Mixtral: 12.9 B of 46.7 B, norms and embedding among them.
        ('Mixtral-8x7B-v0.1', 12_879_925_248 - 32000 * 4096 - 65 * 4096, 32 * 2 * 32 * 128),
    ],
)
def test_published_numbers_of_active_parameters(name, kernels, places):
    """A text of 2 v tokens sees v keys on average."""
    cfg = config_from_hf(PUBLISHED[name]['config'])
    assert _forward(cfg, 2000) == pytest.approx(2 * kernels + 2 * places * 1000, rel=1e-12)


def _products(jaxpr) -> int:
    """Operations of all matrix products in a traced program, loops and calls included."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [tuple(value.aval.shape) for value in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == 'ragged_dot_general':  # every row meets one kernel, however many there are
            (rows, inner), out = shapes[0], shapes[1][-1]
            total += 2 * rows * inner * out
        assert equation.primitive.name != 'while', 'how often it runs is not written in the program'
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    total += _products(inner) * equation.params.get('length', 1)
    return total


@pytest.mark.parametrize(
    'name', ['qwen3_moe', 'deepseek_v3', 'deepseek_v3_plain', 'mamba2', 'nemotron_h', 'nemotron_h_latent']
)
def test_products_of_the_traced_program(name, monkeypatch):
    """Forward, and forward and backward, of a tiny model whose attention multiplies masked keys too."""
    monkeypatch.setattr(grouped_matmul, 'choose_implementation', lambda x, kernels: 'ragged')
    cfg, length = config_from_hf(json.loads((GOLDEN / 'models' / name / 'config.json').read_text())), 16
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def logits(params, tokens):
        return unembed(cfg, params, forward(cfg, params, tokens, compute=Compute(attention='dense')).hidden_BTD).sum()

    weighed = scanned = convolved = 0
    for kind in cfg.layer_kinds():
        if kind.experts:  # the sum over a token's experts is a product here
            weighed += 2 * cfg.experts.per_token * (cfg.experts.latent_width or cfg.width)
        if kind.mixer == 'mamba':  # a convolution is no product, a scan in one chunk is attention besides
            entering = cfg.state_space.groups * cfg.state_space.state_dim
            convolved += 2 * cfg.state_space.conv_width * (2 * entering + cfg.state_space.width)
            chunk = 2 * length * (entering + cfg.state_space.width)
            scanned += chunk + 4 * cfg.state_space.width * cfg.state_space.state_dim
            weighed += chunk
    counted = flops_per_token(cfg, 2 * length)  # half of a causal mask's keys are those of a text twice as long
    forward_only = _products(jax.make_jaxpr(logits)(params, tokens).jaxpr) / length
    assert forward_only == counted.forward + weighed - convolved
    both = _products(jax.make_jaxpr(jax.grad(logits))(params, tokens).jaxpr) / length
    assert both == counted.training + 3 * (weighed - convolved) + scanned  # the backward pass of a scan repeats it


def test_attention_is_the_area_of_the_mask():
    cfg, windowed = _config(layers=1), _config(layers=1, window=100)
    position = np.arange(1000)
    seen = (position[:, None] >= position) & (position[:, None] - position < 100)
    without = 2 * (64 * (2 * 64 + 2 * 32 + 3 * 160) + 128 * 64)
    assert _forward(cfg, 1000) - without == pytest.approx(4 * 64 * 500)
    assert _forward(windowed, 1000) - without == pytest.approx(4 * 64 * seen.sum(1).mean(), rel=0.01)
    assert _forward(windowed, 100) == _forward(cfg, 100)
    chunked = _config(layers=1, chunk=300)
    seen = (position[:, None] >= position) & (position[:, None] // 300 == position // 300)
    assert _forward(chunked, 1000) - without == pytest.approx(4 * 64 * (seen.sum(1).mean() - 0.5))
    both = _config(layers=1, window=100, chunk=300)
    seen &= position[:, None] - position < 100
    assert _forward(both, 1000) - without == pytest.approx(4 * 64 * seen.sum(1).mean(), rel=0.01)
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


def test_modules_for_further_tokens_are_layers_with_a_map_and_a_head():
    """Two modules of the model's own kind of layer: a map [D, 2 D] and the head each, all of it done three times."""
    plain = _config()
    both = dataclasses.replace(plain, mtp=tuple(plain.layer_kinds())[:2])
    own = (_forward(plain) - 2 * 128 * 64) / 3 + 2 * 2 * 64 * 64 + 2 * 128 * 64
    assert _forward(both) == _forward(plain) + 2 * own
    everything = flops_per_token(both, 32)
    assert everything.training == 3 * everything.forward
    assert flops_per_token(both, 32, _trained(both, [])) == everything


def test_of_experts_a_token_meets_those_that_it_goes_to():
    """Three of eight, whether their kernels are trained or not; router and shared MLP are met by every token."""
    kind = LayerKind(rope=Rope(), experts=True)
    experts = Experts(count=8, per_token=3, width=24, shared_width=40, latent_width=32, corrected=True)
    cfg = dataclasses.replace(_config(), segments=(Segment((kind,), 3),), experts=experts)
    everything = flops_per_token(cfg, 32)
    scores = 3 * 4 * 64 * 16
    chosen, others = 3 * 3 * 32 * 24, 8 * 64 + 2 * 64 * 32 + 3 * 64 * 40 + 64 * (2 * 64 + 2 * 32)
    assert everything.forward == scores + 2 * (3 * (chosen + others) + 128 * 64)
    assert flops_per_token(cfg, 32, _trained(cfg, [])) == everything
    frozen = flops_per_token(cfg, 32, _trained(cfg, ['layers/*/mlp/experts']))
    assert frozen.training == everything.training - 2 * 3 * chosen
    assert frozen.forward == everything.forward


def test_a_mamba_layer_counts_its_filters_and_its_state():
    """Two maps out, x, b, c and a step per head in; four taps over x, b and c; 4 operations per number of state."""
    space = StateSpace(num_heads=6, head_dim=16, groups=2, state_dim=10, conv_width=4)
    cfg = dataclasses.replace(_config(), segments=(Segment((LayerKind(mixer='mamba'),), 3),), state_space=space)
    everything = flops_per_token(cfg, [7, 9])
    filters = 4 * (96 + 2 * 2 * 10)
    layer = 64 * (96 + 96 + 20 + 20 + 6) + 96 * 64 + filters
    assert everything.forward == 2 * (3 * layer + 128 * 64) + 3 * 4 * 96 * 10
    assert flops_per_token(cfg, 16, _trained(cfg, [])) == everything
    frozen = flops_per_token(cfg, 16, _trained(cfg, ['layers/*/mamba/conv_*']))
    assert frozen.training == everything.training - 2 * 3 * filters


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
