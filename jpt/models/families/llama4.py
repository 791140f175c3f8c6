"""Llama 4, text: chunked attention, layers without rotary embedding, experts that weigh their input."""

import dataclasses
from typing import Any

from jpt.models.config import Experts, LayerKind, ModelConfig, Temperature
from jpt.models.families.dialect import Stored
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.llama import LLAMA_DIALECT, llama_like, write_llama_like
from jpt.models.families.rope_fields import read_rope

# All experts lie in one tensor, stored (in, out), gate before up.
_BOTH = ('mlp.experts.gate', 'mlp.experts.up')
_GATE_UP = Stored('feed_forward.experts.gate_up_proj', transposed=True, beside=_BOTH)
LLAMA4_DIALECT = dataclasses.replace(
    LLAMA_DIALECT,
    layer={
        **{module: name for module, name in LLAMA_DIALECT.layer.items() if not module.startswith('mlp.')},
        'mlp.gate': 'feed_forward.gate_proj',
        'mlp.up': 'feed_forward.up_proj',
        'mlp.down': 'feed_forward.down_proj',
        'mlp.router': 'feed_forward.router',
        'mlp.experts.gate.kernel': _GATE_UP,
        'mlp.experts.up.kernel': _GATE_UP,
        'mlp.experts.down.kernel': Stored('feed_forward.experts.down_proj', transposed=True),
        'mlp.shared.gate': 'feed_forward.shared_expert.gate_proj',
        'mlp.shared.up': 'feed_forward.shared_expert.up_proj',
        'mlp.shared.down': 'feed_forward.shared_expert.down_proj',
    },
)


def _read(fields: Fields) -> ModelConfig:
    fields.ignore('output_router_logits', 'router_jitter_noise', 'for_llm_compressor', 'cache_implementation')
    layers = fields.integer('num_hidden_layers')
    kinds = _kinds(fields, layers)
    width = fields.integer('intermediate_size')
    experts = Experts(
        count=fields.integer('num_local_experts', 16),
        per_token=fields.integer('num_experts_per_tok', 1),
        width=width,
        scoring='sigmoid',
        normalized=False,
        on_input=True,
        shared_width=width,
        router_aux_loss_coef=fields.number('router_aux_loss_coef', 0.001),
    )
    bias = fields.boolean('attention_bias', False)
    return llama_like(
        fields,
        kinds,
        default_length=131072,
        head_dim=fields.integer('head_dim', 128),
        mlp_width=fields.integer('intermediate_size_mlp', 16384),
        norm_eps=fields.number('rms_norm_eps', 1e-5),
        qkv_bias=bias,
        attention_out_bias=bias,
        experts=experts if any(kind.experts for kind in kinds) else None,
    )


def _kinds(fields: Fields, layers: int) -> tuple[LayerKind, ...]:
    every = fields.positive('no_rope_layer_interval', 4)
    rotary = fields.integers('no_rope_layers', ()) or [int((i + 1) % every != 0) for i in range(layers)]
    chunked = ['chunked_attention' if uses else 'full_attention' for uses in rotary]
    types = fields.layer_types(chunked, ('full_attention', 'chunked_attention'))
    step = fields.positive('interleave_moe_layer_step', 1)
    sparse = fields.integers('moe_layers', range(step - 1, layers, step))
    chunk = fields.optional_integer('attention_chunk_size', 8192)
    if len(rotary) != layers or len(types) != layers:
        raise ValueError(
            f'config.json: no_rope_layers has {len(rotary)} entries and layer_types {len(types)}: expected '
            f'num_hidden_layers={layers}'
        )
    rope = read_rope(fields, fields.integer('max_position_embeddings', 131072), 500_000.0)
    rope = dataclasses.replace(rope, interleaved=True)
    norm = fields.boolean('use_qk_norm', True)
    tuning = Temperature(fields.number('attn_scale', 0.1), fields.integer('floor_scale', 8192))
    fields.expect('attn_temperature_tuning', (True, False, 4))  # published configs have 4, which acts as true
    tuned = bool(fields.get('attn_temperature_tuning', True))
    return tuple(
        LayerKind(
            rope if rotary[layer] else None,
            chunk=chunk if types[layer] == 'chunked_attention' else None,
            unit_qk=norm and bool(rotary[layer]),
            temperature=tuning if tuned and not rotary[layer] else None,
            experts=layer in sparse,
        )
        for layer in range(layers)
    )


def _write(cfg: ModelConfig) -> dict[str, Any]:
    kinds, experts = list(cfg.layer_kinds()), cfg.experts
    temperature = next((kind.temperature for kind in kinds if kind.temperature), None)
    config = write_llama_like(cfg) | {
        'attention_bias': cfg.qkv_bias,
        'intermediate_size_mlp': kinds[0].mlp_width,
        'no_rope_layers': [int(kind.rope is not None) for kind in kinds],
        'layer_types': ['chunked_attention' if kind.chunk else 'full_attention' for kind in kinds],
        'attention_chunk_size': next((kind.chunk for kind in kinds if kind.chunk), 8192),
        'moe_layers': [layer for layer, kind in enumerate(kinds) if kind.experts],
        'use_qk_norm': any(kind.unit_qk for kind in kinds),
        'attn_temperature_tuning': temperature is not None,
    }
    if temperature is not None:
        config |= {'attn_scale': temperature.scale, 'floor_scale': int(temperature.floor)}
    if experts is None:
        return config
    return config | {
        'intermediate_size': experts.width,
        'num_local_experts': experts.count,
        'num_experts_per_tok': experts.per_token,
        'router_aux_loss_coef': experts.router_aux_loss_coef,
    }


LLAMA4 = Family('Llama4ForCausalLM', _read, _write, LLAMA4_DIALECT)
