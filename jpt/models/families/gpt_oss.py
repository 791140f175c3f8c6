"""gpt-oss: attention sinks, windows by turns, experts with biases and a clamped gate."""

import dataclasses
from typing import Any

from jpt.models.config import ClampedGate, Experts, LayerKind, ModelConfig, Rope
from jpt.models.families.dialect import Stored
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.llama import LLAMA_DIALECT, layer_types_of, llama_like, windows_of, write_llama_like
from jpt.models.families.rope_fields import read_rope

# All experts lie in one tensor, stored (in, out), rows of gate and up by turns.
_BOTH = ('mlp.experts.gate', 'mlp.experts.up')
_GATE_UP = Stored('mlp.experts.gate_up_proj', transposed=True, beside=_BOTH, interleaved=True)
_GATE_UP_BIAS = Stored('mlp.experts.gate_up_proj_bias', beside=_BOTH, interleaved=True)
GPT_OSS_DIALECT = dataclasses.replace(
    LLAMA_DIALECT,
    layer={
        **LLAMA_DIALECT.layer,
        'attn.sinks': 'self_attn.sinks',
        'mlp.router': 'mlp.router',
        'mlp.experts.gate.kernel': _GATE_UP,
        'mlp.experts.up.kernel': _GATE_UP,
        'mlp.experts.gate.bias': _GATE_UP_BIAS,
        'mlp.experts.up.bias': _GATE_UP_BIAS,
        'mlp.experts.down.kernel': Stored('mlp.experts.down_proj', transposed=True),
        'mlp.experts.down.bias': 'mlp.experts.down_proj_bias',
    },
)
# What transformers takes where a config says nothing of the rotary embedding.
_ROPE = Rope(150_000.0, 'yarn', 32.0, 4096, truncate=False)


def _read(fields: Fields) -> ModelConfig:
    fields.ignore('output_router_logits', 'experts_per_token', 'initial_context_length')
    _check_quantization(fields)
    layers = fields.integer('num_hidden_layers')
    says = fields.has('rope_parameters') or fields.has('rope_scaling')
    rope = read_rope(fields, fields.integer('max_position_embeddings', 131072), 150_000.0)
    if not says:
        rope = dataclasses.replace(_ROPE, theta=rope.theta)
    types = fields.layer_types(['full_attention' if i % 2 else 'sliding_attention' for i in range(layers)])
    bias = fields.boolean('attention_bias', True)
    experts = Experts(
        count=fields.integer('num_local_experts', 128),
        per_token=fields.integer('num_experts_per_tok', 4),
        width=fields.integer('intermediate_size', 2880),
        biases=True,
        router_aux_loss_coef=fields.number('router_aux_loss_coef', 0.001),
    )
    return llama_like(
        fields,
        tuple(LayerKind(rope, window, experts=True) for window in windows_of(fields, types, 128)),
        default_length=131072,
        head_dim=fields.integer('head_dim', 64),
        norm_eps=fields.number('rms_norm_eps', 1e-5),
        qkv_bias=bias,
        attention_out_bias=bias,
        sinks=True,
        clamped_gate=ClampedGate(fields.number('swiglu_alpha', 1.702), fields.number('swiglu_limit', 7.0)),
        experts=experts,
    )


def _check_quantization(fields: Fields) -> None:
    """How the experts are stored changes no computation, where it is in MXFP4: that is read (checkpoint/mxfp4.py)."""
    given = fields.get('quantization_config')
    if given is None:
        return
    if not isinstance(given, dict):
        raise ValueError(f'config.json: quantization_config={given!r}: expected an object ({fields.family})')
    method = given.get('quant_method')
    if method != 'mxfp4':
        raise ValueError(
            f"config.json: quantization_config.quant_method={method!r}: expected 'mxfp4' ({fields.family})"
        )
    unknown = sorted(set(given) - {'quant_method', 'modules_to_not_convert', 'dequantize'})
    if unknown:
        raise ValueError(f'config.json: quantization_config has unknown fields: {", ".join(unknown)} ({fields.family})')


def _write(cfg: ModelConfig) -> dict[str, Any]:
    experts, gate = cfg.experts, cfg.clamped_gate
    assert experts is not None
    assert gate is not None
    return write_llama_like(cfg) | {
        'attention_bias': cfg.qkv_bias,
        'layer_types': layer_types_of(cfg),
        # transformers needs a number even where no layer has a window
        'sliding_window': next((kind.window for kind in cfg.layer_kinds() if kind.window), 128),
        'swiglu_alpha': gate.alpha,
        'swiglu_limit': gate.limit,
        'num_local_experts': experts.count,
        'num_experts_per_tok': experts.per_token,
        'router_aux_loss_coef': experts.router_aux_loss_coef,
    }


GPT_OSS = Family('GptOssForCausalLM', _read, _write, GPT_OSS_DIALECT)
