"""Hugging Face model configs to ModelConfig and back, one entry per family.

A field that is neither read nor known to leave the computation alone is an error: a checkpoint is never loaded as
something that it is not. Both dialects are read: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpt.models.config import LayerKind, ModelConfig, runs_of, segments_of
from jpt.models.fields import ACTIVATION_NAMES, Fields
from jpt.models.gpt2_fields import read_gpt2, write_gpt2
from jpt.models.rope_fields import read_rope, read_ropes_by_layer, write_rope, write_ropes_by_layer

HuggingFace = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model_type is read and written."""

    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


def config_from_hf(config: HuggingFace) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json.

    Raises:
        ValueError: an unsupported model_type, a field that is not known, or a value that jpt does not compute.
    """
    family = config.get('model_type')
    if family not in FAMILIES:
        raise ValueError(f'config.json: model_type={family!r}: expected one of {", ".join(sorted(FAMILIES))}')
    fields = Fields(config, family)
    cfg = FAMILIES[family].read(fields)
    fields.check_all_read()
    return cfg


def config_to_hf(cfg: ModelConfig, dtype: str = 'float32') -> dict[str, Any]:
    """The config.json of a model, in a dialect that transformers 4 and 5, vLLM and SGLang read.

    `rope_parameters` with `dtype` is the newer dialect; `rope_theta`, `rope_scaling` and `torch_dtype` say the same to
    older readers.
    """
    family = FAMILIES[cfg.family]
    head = {'architectures': [family.architecture], 'model_type': cfg.family}
    return head | family.write(cfg) | {'torch_dtype': dtype, 'dtype': dtype}


def _llama_like(fields: Fields, kinds: tuple[LayerKind, ...] | None = None, **more: Any) -> ModelConfig:
    """The fields that Llama and its descendants share."""
    heads = fields.integer('num_attention_heads')
    width = fields.integer('hidden_size')
    layers = fields.integer('num_hidden_layers')
    head_dim = more.pop('head_dim', None) or fields.optional_integer('head_dim') or width // heads
    mlp_width = fields.integer('intermediate_size')
    max_length = fields.integer('max_position_embeddings', more.pop('default_length', 2048))
    if kinds is None:
        kinds = (LayerKind(read_rope(fields, max_length)),) * layers
    if len(kinds) != layers:
        raise ValueError(f'config.json: layer_types has {len(kinds)} entries: expected num_hidden_layers={layers}')
    kinds = tuple(dataclasses.replace(kind, mlp_width=mlp_width) for kind in kinds)
    period = more.pop('period', None)
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
        segments=segments_of(kinds, period) if period else runs_of(kinds),
        max_length=max_length,
        **(values | more),
    )


def _write_llama_like(cfg: ModelConfig) -> dict[str, Any]:
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
    return _llama_like(fields, qkv_bias=bias, attention_out_bias=bias, mlp_bias=fields.boolean('mlp_bias', False))


def _write_llama(cfg: ModelConfig) -> dict[str, Any]:
    return _write_llama_like(cfg) | {'attention_bias': cfg.qkv_bias, 'mlp_bias': cfg.mlp_bias}


def _read_mistral(fields: Fields) -> ModelConfig:
    window = fields.optional_integer('sliding_window', 4096)
    max_length = fields.integer('max_position_embeddings', 4096 * 32)
    kind = LayerKind(read_rope(fields, max_length), window)
    kinds = (kind,) * fields.integer('num_hidden_layers')
    fields.expect('attention_bias', (None, False))
    return _llama_like(fields, kinds, default_length=4096 * 32)


def _write_mistral(cfg: ModelConfig) -> dict[str, Any]:
    return _write_llama_like(cfg) | {'sliding_window': next(cfg.layer_kinds()).window}


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
    return _llama_like(fields, _qwen_kinds(fields), default_length=32768, qkv_bias=True)


def _read_qwen3(fields: Fields) -> ModelConfig:
    bias = fields.boolean('attention_bias', False)
    head_dim = fields.integer('head_dim', 128)
    kinds = _qwen_kinds(fields)
    return _llama_like(
        fields, kinds, default_length=32768, head_dim=head_dim, qk_norm=True, qkv_bias=bias, attention_out_bias=bias
    )


def _write_qwen(cfg: ModelConfig) -> dict[str, Any]:
    windows = [kind.window for kind in cfg.layer_kinds()]
    window = next((window for window in windows if window), None)
    config = _write_llama_like(cfg) | {
        'use_sliding_window': window is not None,
        'sliding_window': window,
        'max_window_layers': next((i for i, w in enumerate(windows) if w), cfg.num_layers),
        'layer_types': _layer_types(cfg),
    }
    return config | ({'attention_bias': cfg.qkv_bias} if cfg.family == 'qwen3' else {})


def _layer_types(cfg: ModelConfig) -> list[str]:
    return ['sliding_attention' if kind.window else 'full_attention' for kind in cfg.layer_kinds()]


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
    return _llama_like(
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


def _windows(fields: Fields, types: Sequence[str]) -> list[int | None]:
    """The window of each layer."""
    window = fields.optional_integer('sliding_window', 4096)
    if window is None and 'sliding_attention' in types:
        raise ValueError('config.json: sliding_window is null, but there are layers of sliding_attention')
    return [window if name == 'sliding_attention' else None for name in types]


def _read_gemma2(fields: Fields) -> ModelConfig:
    layers = fields.integer('num_hidden_layers')
    rope = read_rope(fields, fields.integer('max_position_embeddings', 8192))
    types = fields.layer_types(['full_attention' if i % 2 else 'sliding_attention' for i in range(layers)])
    fields.ignore('cache_implementation', 'sliding_window_size')  # the second repeats sliding_window
    kinds = tuple(LayerKind(rope, window) for window in _windows(fields, types))
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
    kinds = tuple(LayerKind(ropes[name], window) for name, window in zip(types, _windows(fields, types), strict=True))
    # transformers writes the second one and never reads it
    fields.ignore('cache_implementation', '_sliding_window_pattern')
    fields.ignore('attn_logit_softcapping')  # transformers' Gemma 3 has the field and never applies it
    return _gemma_like(fields, kinds, default_length=131072, qk_norm=True, **_gemma_post_norm_fields(fields, None))


def _write_gemma(cfg: ModelConfig) -> dict[str, Any]:
    config = _write_llama_like(cfg) | {'attention_bias': cfg.qkv_bias}
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
        'layer_types': _layer_types(cfg),
    }
    if cfg.family == 'gemma3_text':
        config |= write_ropes_by_layer(
            {('sliding_attention' if kind.window else 'full_attention'): kind.rope for kind in kinds}
        )
    return config


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-6 * abs(value) else value


FAMILIES: dict[str, Family] = {
    'llama': Family('LlamaForCausalLM', _read_llama, _write_llama),
    'mistral': Family('MistralForCausalLM', _read_mistral, _write_mistral),
    'qwen2': Family('Qwen2ForCausalLM', _read_qwen2, _write_qwen),
    'qwen3': Family('Qwen3ForCausalLM', _read_qwen3, _write_qwen),
    'gemma': Family('GemmaForCausalLM', _read_gemma, _write_gemma),
    'gemma2': Family('Gemma2ForCausalLM', _read_gemma2, _write_gemma),
    'gemma3_text': Family('Gemma3ForCausalLM', _read_gemma3, _write_gemma),
    'gpt2': Family('GPT2LMHeadModel', read_gpt2, write_gpt2),
}
