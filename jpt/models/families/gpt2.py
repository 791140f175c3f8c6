"""GPT-2, which has names of its own for everything, and kernels stored (in, out) by its Conv1D."""

from typing import Any

from jpt.models.config import LayerKind, ModelConfig, runs_of
from jpt.models.families.dialect import Dialect, Stored
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields

_QKV = Stored('attn.c_attn', transposed=True, beside=('attn.q', 'attn.k', 'attn.v'))
GPT2_DIALECT = Dialect(
    embed='transformer.wte',
    layer_prefix='transformer.h',
    layer={
        'attn_norm': 'ln_1',
        'attn.q': _QKV,
        'attn.k': _QKV,
        'attn.v': _QKV,
        'attn.out': Stored('attn.c_proj', transposed=True),
        'mlp_norm': 'ln_2',
        'mlp.up': Stored('mlp.c_fc', transposed=True),
        'mlp.down': Stored('mlp.c_proj', transposed=True),
    },
    final_norm='transformer.ln_f',
    positions='transformer.wpe',
)


def _read_gpt2(fields: Fields) -> ModelConfig:
    """The ModelConfig of a GPT-2.

    Raises:
        ValueError: a value that jpt does not compute.
    """
    fields.expect('add_cross_attention', (False,))
    # How products are ordered and what is computed in float32 is not what is computed.
    fields.ignore('reorder_and_upcast_attn', 'n_ctx', 'resid_pdrop', 'embd_pdrop', 'attn_pdrop', 'summary_type')
    fields.ignore('n_special', 'predict_special_tokens', 'output_past')
    fields.ignore('summary_use_proj', 'summary_activation', 'summary_proj_to_labels', 'summary_first_dropout')
    width, heads = fields.integer('n_embd', 768), fields.integer('n_head', 12)
    if width % heads:
        raise ValueError(f'config.json: n_embd={width}: expected a multiple of n_head={heads} (gpt2)')
    scale = (width // heads) ** -0.5 if fields.boolean('scale_attn_weights', True) else 1.0
    by_layer = fields.boolean('scale_attn_by_inverse_layer_idx', False)
    mlp_width = fields.optional_integer('n_inner') or 4 * width
    kinds = tuple(
        LayerKind(mlp_width=mlp_width, attention_scale=scale / (layer + 1) if by_layer else None)
        for layer in range(fields.integer('n_layer', 12))
    )
    return ModelConfig(
        family='gpt2',
        vocab_size=fields.integer('vocab_size', 50257),
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        segments=runs_of(kinds),
        max_length=fields.integer('n_positions', 1024),
        activation=fields.choice('activation_function', ACTIVATION_NAMES, 'gelu_new'),
        gated_mlp=False,
        norm='layer',
        norm_eps=fields.number('layer_norm_epsilon', 1e-5),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        attention_scale=None if fields.boolean('scale_attn_weights', True) else 1.0,
        learned_positions=True,
        tied=fields.boolean('tie_word_embeddings', True),
    )


def _write_gpt2(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that `_read_gpt2` reads."""
    first = next(cfg.layer_kinds())
    return {
        'vocab_size': cfg.vocab_size,
        'n_embd': cfg.width,
        'n_head': cfg.num_heads,
        'n_layer': cfg.num_layers,
        'n_inner': first.mlp_width,
        'n_positions': cfg.max_length,
        'activation_function': 'gelu_new' if cfg.activation == 'gelu_tanh' else cfg.activation,
        'layer_norm_epsilon': cfg.norm_eps,
        'tie_word_embeddings': cfg.tied,
        'scale_attn_weights': cfg.attention_scale is None,
        'scale_attn_by_inverse_layer_idx': first.attention_scale is not None,
    }


GPT2 = Family('GPT2LMHeadModel', _read_gpt2, _write_gpt2, GPT2_DIALECT)
