"""Llama and Mistral, and what their many descendants share with them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jpt.models.config import LayerKind, ModelConfig, runs_of
from jpt.models.families.dialect import Dialect
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields
from jpt.models.families.rope_fields import read_rope, write_rope

LLAMA_DIALECT = Dialect(
    embed='model.embed_tokens',
    layer_prefix='model.layers',
    layer={
        'attn_norm': 'input_layernorm',
        'attn.q': 'self_attn.q_proj',
        'attn.k': 'self_attn.k_proj',
        'attn.v': 'self_attn.v_proj',
        'attn.q_norm': 'self_attn.q_norm',
        'attn.k_norm': 'self_attn.k_norm',
        'attn.out': 'self_attn.o_proj',
        'mlp_norm': 'post_attention_layernorm',
        'mlp.gate': 'mlp.gate_proj',
        'mlp.up': 'mlp.up_proj',
        'mlp.down': 'mlp.down_proj',
    },
    final_norm='model.norm',
)


def llama_like(fields: Fields, kinds: tuple[LayerKind, ...] | None = None, **more: Any) -> ModelConfig:
    """The fields that Llama and its descendants share."""
    heads = fields.integer('num_attention_heads')
    width = fields.integer('hidden_size')
    layers = fields.integer('num_hidden_layers')
    head_dim = more.pop('head_dim', None) or fields.optional_integer('head_dim') or width // heads
    mlp_width = more.pop('mlp_width', None) or fields.integer('intermediate_size')
    max_length = fields.integer('max_position_embeddings', more.pop('default_length', 2048))
    if kinds is None:
        kinds = (LayerKind(read_rope(fields, max_length)),) * layers
    if len(kinds) != layers:
        raise ValueError(f'config.json: layer_types has {len(kinds)} entries: expected num_hidden_layers={layers}')
    kinds = tuple(dataclasses.replace(kind, mlp_width=mlp_width) for kind in kinds)
    values: dict[str, Any] = {
        'activation': fields.choice('hidden_act', ACTIVATION_NAMES, 'silu') if 'activation' not in more else '',
        'tied': fields.boolean('tie_word_embeddings', more.pop('default_tied', False)),
        'norm_eps': fields.number('rms_norm_eps', 1e-6),
    }
    return ModelConfig(
        family=fields.family,
        vocab_size=fields.integer('vocab_size'),
        width=width,
        num_heads=heads,
        num_kv_heads=fields.optional_integer('num_key_value_heads') or heads,
        head_dim=head_dim,
        segments=runs_of(kinds),
        max_length=max_length,
        **(values | more),
    )


def write_llama_like(cfg: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that all families share that are like Llama; a family adds its own."""
    kinds = list(cfg.layer_kinds())
    activation = 'gelu_pytorch_tanh' if cfg.activation == 'gelu_tanh' else cfg.activation
    config: dict[str, Any] = {
        'vocab_size': cfg.vocab_size,
        'hidden_size': cfg.width,
        'intermediate_size': kinds[0].mlp_width,
        'num_hidden_layers': cfg.num_layers,
        'num_attention_heads': cfg.num_heads,
        'num_key_value_heads': cfg.num_kv_heads,
        'head_dim': cfg.head_dim,
        'max_position_embeddings': cfg.max_length,
        'rms_norm_eps': cfg.norm_eps,
        'tie_word_embeddings': cfg.tied,
        'hidden_act': activation,
    }
    ropes = cfg.ropes()
    return config | (write_rope(ropes[0]) if len(ropes) == 1 else {})


def _read_llama(fields: Fields) -> ModelConfig:
    bias = fields.boolean('attention_bias', False)
    fields.expect('pretraining_tp', (1, None))  # a way to split products, not another product; 1 in every release
    return llama_like(fields, qkv_bias=bias, attention_out_bias=bias, mlp_bias=fields.boolean('mlp_bias', False))


def _write_llama(cfg: ModelConfig) -> dict[str, Any]:
    return write_llama_like(cfg) | {'attention_bias': cfg.qkv_bias, 'mlp_bias': cfg.mlp_bias}


def _read_mistral(fields: Fields) -> ModelConfig:
    window = fields.optional_integer('sliding_window', 4096)
    max_length = fields.integer('max_position_embeddings', 4096 * 32)
    kind = LayerKind(read_rope(fields, max_length), window)
    kinds = (kind,) * fields.integer('num_hidden_layers')
    fields.expect('attention_bias', (None, False))
    return llama_like(fields, kinds, default_length=4096 * 32)


def _write_mistral(cfg: ModelConfig) -> dict[str, Any]:
    return write_llama_like(cfg) | {'sliding_window': next(cfg.layer_kinds()).window}


def layer_types_of(cfg: ModelConfig) -> list[str]:
    return ['sliding_attention' if kind.window else 'full_attention' for kind in cfg.layer_kinds()]


def windows_of(fields: Fields, types: Sequence[str], default: int = 4096) -> list[int | None]:
    """The window of each layer."""
    window = fields.optional_integer('sliding_window', default)
    if window is None and 'sliding_attention' in types:
        raise ValueError('config.json: sliding_window is null, but there are layers of sliding_attention')
    return [window if name == 'sliding_attention' else None for name in types]


LLAMA = Family('LlamaForCausalLM', _read_llama, _write_llama, LLAMA_DIALECT)
MISTRAL = Family('MistralForCausalLM', _read_mistral, _write_mistral, LLAMA_DIALECT)
