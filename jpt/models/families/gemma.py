"""Gemma 1, 2 and 3, text."""

import dataclasses
from typing import Any

from jpt.models.config import LayerKind, ModelConfig
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields
from jpt.models.families.llama import LLAMA_DIALECT, layer_types_of, llama_like, windows_of, write_llama_like
from jpt.models.families.rope_fields import read_rope, read_ropes_by_layer, write_ropes_by_layer

POST_NORM_DIALECT = dataclasses.replace(
    LLAMA_DIALECT,
    layer={
        **LLAMA_DIALECT.layer,
        'attn_post_norm': 'post_attention_layernorm',
        'mlp_norm': 'pre_feedforward_layernorm',
        'mlp_post_norm': 'post_feedforward_layernorm',
    },
)


def _gemma_activation(fields: Fields) -> str:
    # Gemma 1 is ruled by hidden_act, where the first release's 'gelu' means the tanh form; its successors by
    # hidden_activation, and published configs carry both.
    own, other = (
        ('hidden_act', 'hidden_activation') if fields.family == 'gemma' else ('hidden_activation', 'hidden_act')
    )
    fields.ignore(other)
    known = ACTIVATION_NAMES | ({'gelu': 'gelu_tanh'} if fields.family == 'gemma' else {})
    return fields.choice(own, known, 'gelu_pytorch_tanh')


def _gemma_like(fields: Fields, kinds: tuple[LayerKind, ...] | None, **more: Any) -> ModelConfig:
    fields.expect('use_bidirectional_attention', (None, False))
    bias = fields.boolean('attention_bias', False)
    return llama_like(
        fields,
        kinds,
        activation=_gemma_activation(fields),
        default_tied=True,
        norm_offset=1.0,
        embed_scale=fields.integer('hidden_size') ** 0.5,
        qkv_bias=bias,
        attention_out_bias=bias,
        head_dim=fields.integer('head_dim', 256),
        **more,
    )


def _read_gemma(fields: Fields) -> ModelConfig:
    return _gemma_like(fields, None, default_length=8192)


def _gemma_post_norm_fields(fields: Fields, cap_logits: float | None) -> dict[str, Any]:
    return {
        'post_norms': True,
        'attention_scale': fields.number('query_pre_attn_scalar', 256) ** -0.5,
        'logit_soft_cap': fields.optional_number('final_logit_softcapping', cap_logits),
    }


def _read_gemma2(fields: Fields) -> ModelConfig:
    layers = fields.integer('num_hidden_layers')
    rope = read_rope(fields, fields.integer('max_position_embeddings', 8192))
    types = fields.layer_types(['full_attention' if i % 2 else 'sliding_attention' for i in range(layers)])
    fields.ignore('cache_implementation', 'sliding_window_size')  # the second repeats sliding_window
    kinds = tuple(LayerKind(rope, window) for window in windows_of(fields, types))
    cap = fields.optional_number('attn_logit_softcapping', 50.0)
    return _gemma_like(
        fields, kinds, default_length=8192, attention_soft_cap=cap, **_gemma_post_norm_fields(fields, 30.0)
    )


def _read_gemma3(fields: Fields) -> ModelConfig:
    layers = fields.integer('num_hidden_layers')
    length = fields.integer('max_position_embeddings', 131072)
    pattern = fields.optional_integer('sliding_window_pattern', 6) or 6
    types = fields.layer_types(['sliding_attention' if (i + 1) % pattern else 'full_attention' for i in range(layers)])
    ropes = read_ropes_by_layer(fields, length)
    kinds = tuple(LayerKind(ropes[name], window) for name, window in zip(types, windows_of(fields, types), strict=True))
    # transformers writes the second one and never reads it
    fields.ignore('cache_implementation', '_sliding_window_pattern')
    fields.ignore('attn_logit_softcapping')  # transformers' Gemma 3 has the field and never applies it
    return _gemma_like(fields, kinds, default_length=131072, qk_norm=True, **_gemma_post_norm_fields(fields, None))


def _write_gemma(cfg: ModelConfig) -> dict[str, Any]:
    config = write_llama_like(cfg) | {'attention_bias': cfg.qkv_bias}
    config['hidden_activation'] = config['hidden_act']
    if cfg.family == 'gemma':
        return config
    del config['hidden_act']
    kinds = list(cfg.layer_kinds())
    config |= {
        'query_pre_attn_scalar': _whole(cfg.scale**-2),
        'final_logit_softcapping': cfg.logit_soft_cap,
        'attn_logit_softcapping': cfg.attention_soft_cap,
        # transformers needs a number even where no layer has a window
        'sliding_window': next((kind.window for kind in kinds if kind.window), 4096),
        'layer_types': layer_types_of(cfg),
    }
    if cfg.family == 'gemma3_text':
        config |= write_ropes_by_layer(
            {('sliding_attention' if kind.window else 'full_attention'): kind.rope for kind in kinds}
        )
    return config


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-6 * abs(value) else value


GEMMA = Family('GemmaForCausalLM', _read_gemma, _write_gemma, LLAMA_DIALECT)
GEMMA2 = Family('Gemma2ForCausalLM', _read_gemma2, _write_gemma, POST_NORM_DIALECT)
GEMMA3 = Family('Gemma3ForCausalLM', _read_gemma3, _write_gemma, POST_NORM_DIALECT)
