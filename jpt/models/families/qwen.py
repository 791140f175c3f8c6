"""Qwen 2, 2.5 and 3, and Qwen 3 with experts."""

import dataclasses
from typing import Any

from jpt.models.config import Experts, LayerKind, ModelConfig
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.llama import LLAMA_DIALECT, layer_types_of, llama_like, write_llama_like
from jpt.models.families.rope_fields import read_rope


def _qwen_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    """Full attention everywhere, or a window from layer max_window_layers on."""
    layers = fields.integer('num_hidden_layers')
    rope = read_rope(fields, fields.integer('max_position_embeddings', 32768))
    uses = fields.boolean('use_sliding_window', False)
    window = fields.optional_integer('sliding_window', 4096)
    first = fields.integer('max_window_layers', 28)
    default = ['sliding_attention' if uses and window and i >= first else 'full_attention' for i in range(layers)]
    types = fields.layer_types(default)
    if 'sliding_attention' in types and not (uses and window):
        raise ValueError('config.json: layer_types names sliding_attention, but use_sliding_window is false')
    return tuple(LayerKind(rope, window if name == 'sliding_attention' else None) for name in types)


def _read_qwen2(fields: Fields) -> ModelConfig:
    return llama_like(fields, _qwen_kinds(fields), default_length=32768, qkv_bias=True)


def _read_qwen3(fields: Fields) -> ModelConfig:
    bias = fields.boolean('attention_bias', False)
    head_dim = fields.integer('head_dim', 128)
    kinds = _qwen_kinds(fields)
    return llama_like(
        fields, kinds, default_length=32768, head_dim=head_dim, qk_norm=True, qkv_bias=bias, attention_out_bias=bias
    )


def _read_qwen3_moe(fields: Fields) -> ModelConfig:
    fields.ignore('output_router_logits', 'max_window_layers')  # all layers have the window, or none
    window = fields.optional_integer('sliding_window', 4096)
    if not fields.boolean('use_sliding_window', False):
        window = None
    rope = read_rope(fields, fields.integer('max_position_embeddings', 32768))
    dense = fields.integers('mlp_only_layers', ())
    step = fields.positive('decoder_sparse_step', 1)
    count = fields.same_integer('num_experts', 'num_local_experts', 128)
    kinds = tuple(
        LayerKind(rope, window, experts=layer not in dense and (layer + 1) % step == 0)
        for layer in range(fields.integer('num_hidden_layers'))
    )
    experts = Experts(
        count=count,
        per_token=fields.integer('num_experts_per_tok', 8),
        width=fields.integer('moe_intermediate_size', 768),
        normalized=fields.boolean('norm_topk_prob', False),
        router_aux_loss_coef=fields.number('router_aux_loss_coef', 0.001),
    )
    if not any(kind.experts for kind in kinds):
        raise ValueError('config.json: mlp_only_layers names every layer: expected some with experts (qwen3_moe)')
    bias = fields.boolean('attention_bias', False)
    return llama_like(
        fields,
        kinds,
        default_length=32768,
        qk_norm=True,
        qkv_bias=bias,
        attention_out_bias=bias,
        experts=experts,
    )


def _write_qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    kinds, experts = list(cfg.layer_kinds()), cfg.experts
    assert experts is not None
    return write_llama_like(cfg) | {
        'attention_bias': cfg.qkv_bias,
        'use_sliding_window': kinds[0].window is not None,
        'sliding_window': kinds[0].window,
        'decoder_sparse_step': 1,
        'mlp_only_layers': [layer for layer, kind in enumerate(kinds) if not kind.experts],
        'num_experts': experts.count,
        'num_local_experts': experts.count,
        'num_experts_per_tok': experts.per_token,
        'moe_intermediate_size': experts.width,
        'norm_topk_prob': experts.normalized,
        'router_aux_loss_coef': experts.router_aux_loss_coef,
    }


def _write_qwen(cfg: ModelConfig) -> dict[str, Any]:
    windows = [kind.window for kind in cfg.layer_kinds()]
    window = next((window for window in windows if window), None)
    config = write_llama_like(cfg) | {
        'use_sliding_window': window is not None,
        'sliding_window': window,
        'max_window_layers': next((i for i, w in enumerate(windows) if w), cfg.num_layers),
        'layer_types': layer_types_of(cfg),
    }
    return config | ({'attention_bias': cfg.qkv_bias} if cfg.family == 'qwen3' else {})


QWEN3_MOE_DIALECT = dataclasses.replace(
    LLAMA_DIALECT,
    layer={
        **LLAMA_DIALECT.layer,
        'mlp.router': 'mlp.gate',
        'mlp.experts.gate': 'mlp.experts.{e}.gate_proj',
        'mlp.experts.up': 'mlp.experts.{e}.up_proj',
        'mlp.experts.down': 'mlp.experts.{e}.down_proj',
    },
)

QWEN2 = Family('Qwen2ForCausalLM', _read_qwen2, _write_qwen, LLAMA_DIALECT)
QWEN3 = Family('Qwen3ForCausalLM', _read_qwen3, _write_qwen, LLAMA_DIALECT)
QWEN3_MOE = Family('Qwen3MoeForCausalLM', _read_qwen3_moe, _write_qwen3_moe, QWEN3_MOE_DIALECT)
