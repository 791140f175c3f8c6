"""Qwen 2, 2.5 and 3, dense."""

from typing import Any

from jpt.models.config import LayerKind, ModelConfig
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


QWEN2 = Family('Qwen2ForCausalLM', _read_qwen2, _write_qwen, LLAMA_DIALECT)
QWEN3 = Family('Qwen3ForCausalLM', _read_qwen3, _write_qwen, LLAMA_DIALECT)
