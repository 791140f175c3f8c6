"""Nemotron-H, whose layers are each a Mamba mixer, attention, an MLP or experts."""

import math
from typing import Any

from jpt.models.config import Experts, LayerKind, ModelConfig, runs_of
from jpt.models.families.dialect import Dialect
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields
from jpt.models.families.mamba2 import MAMBA_LAYER, NO_EFFECT, read_space, read_step_limits, write_space

NEMOTRON_H_DIALECT = Dialect(
    'backbone.embeddings',
    'backbone.layers',
    {
        **MAMBA_LAYER,
        'attn_norm': 'norm',
        'attn.q': 'mixer.q_proj',
        'attn.k': 'mixer.k_proj',
        'attn.v': 'mixer.v_proj',
        'attn.out': 'mixer.o_proj',
        'mlp_norm': 'norm',
        'mlp.up': 'mixer.up_proj',
        'mlp.down': 'mixer.down_proj',
        'mlp.router': 'mixer.gate',
        'mlp.router.correction': 'mixer.gate.e_score_correction_bias',
        'mlp.latent_in': 'mixer.fc1_latent_proj',
        'mlp.experts.up': 'mixer.experts.{e}.up_proj',
        'mlp.experts.down': 'mixer.experts.{e}.down_proj',
        'mlp.latent_out': 'mixer.fc2_latent_proj',
        'mlp.shared.up': 'mixer.shared_experts.up_proj',
        'mlp.shared.down': 'mixer.shared_experts.down_proj',
    },
    'backbone.norm_f',
)
BLOCKS = {'linear_attention': 'M', 'mamba': 'M', 'full_attention': '*', 'attention': '*', 'mlp': '-', 'moe': 'E'}
SPACE_FIELDS = {
    'num_heads': 'mamba_num_heads',
    'head_dim': 'mamba_head_dim',
    'state_dim': 'ssm_state_size',
    'activation': 'mamba_hidden_act',
}


def _pattern(fields: Fields) -> str:
    """The kind of each layer: M for Mamba, * for attention, - for an MLP, E for experts."""
    types, pattern = fields.get('layers_block_type'), fields.text('hybrid_override_pattern', None)
    if types is not None:
        for index, name in enumerate(types):
            if name not in BLOCKS:
                known = ', '.join(BLOCKS)
                raise ValueError(f'config.json: layers_block_type[{index}]={name!r}: expected one of {known}')
        pattern = ''.join(BLOCKS[name] for name in types)
    if pattern is None or set(pattern) - set('M*-E'):
        raise ValueError(f'config.json: hybrid_override_pattern={pattern!r}: expected letters M, *, - and E')
    layers = fields.integer('num_hidden_layers', len(pattern))
    if layers != len(pattern):
        raise ValueError(f'config.json: num_hidden_layers={layers}: the pattern {pattern} has {len(pattern)} layers')
    return pattern


def _check(fields: Fields) -> None:
    """Refuses what would be another computation, in transformers or in the code that NVIDIA publishes beside weights.

    transformers hears none of these fields.
    """
    for name in ('attention_bias', 'mamba_proj_bias', 'tie_word_embeddings'):
        fields.expect(name, (False, None))
    fields.expect('sliding_window', (None,))
    fields.expect('num_nextn_predict_layers', (0, None))
    for name in ('rms_norm_eps', 'norm_eps'):
        fields.expect(name, (fields.number('layer_norm_epsilon', 1e-5), None))
    limits = read_step_limits(fields)
    if limits != (0.0, math.inf):
        raise ValueError(f'config.json: time_step_limit={limits}: expected 0 to infinity, no limits (nemotron_h)')
    # There is no rotary embedding, whatever these say.
    fields.ignore('rope_theta', 'partial_rotary_factor')
    fields.ignore(*NO_EFFECT, 'residual_in_fp32', 'expand', 'moe_shared_expert_overlap', 'num_logits_to_keep')
    fields.ignore('hidden_dropout', 'use_mamba_kernels', 'mamba_ssm_cache_dtype', 'mtp_layers_block_type')
    fields.ignore('output_router_logits', 'auto_map')


def _read_nemotron_h(fields: Fields) -> ModelConfig:
    _check(fields)
    pattern = _pattern(fields)
    mlp_width = fields.integer('intermediate_size', 21504)
    kinds = {
        'M': LayerKind(mixer='mamba'),
        '*': LayerKind(),
        '-': LayerKind(mixer='none', mlp_width=mlp_width),
        'E': LayerKind(mixer='none', experts=True),
    }
    heads, width = fields.integer('num_attention_heads', 32), fields.integer('hidden_size', 4096)
    space = read_space(fields, SPACE_FIELDS, (fields.number('time_step_min', 0.001), math.inf))
    experts = _experts(fields)  # written for patterns without them too
    return ModelConfig(
        family='nemotron_h',
        vocab_size=fields.integer('vocab_size', 131072),
        width=width,
        num_heads=heads,
        num_kv_heads=fields.integer('num_key_value_heads', 8),
        head_dim=fields.integer('head_dim', fields.integer('attention_head_dim', 128)),  # the first release's name
        segments=runs_of(tuple(kinds[letter] for letter in pattern)),
        max_length=fields.integer('max_position_embeddings', 4096),
        activation=fields.choice('mlp_hidden_act', ACTIVATION_NAMES, 'relu2'),
        gated_mlp=False,
        norm_eps=fields.number('layer_norm_epsilon', 1e-5),
        mlp_bias=fields.boolean('mlp_bias', False),
        state_space=space if 'M' in pattern else None,
        experts=experts if 'E' in pattern else None,
    )


def _experts(fields: Fields) -> Experts:
    fields.expect('n_shared_experts', (1, None))
    return Experts(
        count=fields.integer('n_routed_experts', 8),
        per_token=fields.integer('num_experts_per_tok', 2),
        width=fields.integer('moe_intermediate_size', 7688),
        scoring='sigmoid',
        normalized=fields.boolean('norm_topk_prob', True),
        scale=fields.number('routed_scaling_factor', 1.0),
        corrected=True,
        groups=fields.optional_integer('n_group', 1) or 1,
        top_groups=fields.optional_integer('topk_group', 1) or 1,
        shared_width=fields.integer('moe_shared_expert_intermediate_size', 7688),
        latent_width=fields.optional_integer('moe_latent_size'),
    )


def _write_nemotron_h(cfg: ModelConfig) -> dict[str, Any]:
    space, experts = cfg.state_space, cfg.experts
    letters = {'M': 'linear_attention', '*': 'full_attention', '-': 'mlp', 'E': 'moe'}
    pattern = ''.join(_letter(kind) for kind in cfg.layer_kinds())
    config = {
        'vocab_size': cfg.vocab_size,
        'hidden_size': cfg.width,
        'num_hidden_layers': cfg.num_layers,
        'hybrid_override_pattern': pattern,
        'layers_block_type': [letters[letter] for letter in pattern],
        'num_attention_heads': cfg.num_heads,
        'num_key_value_heads': cfg.num_kv_heads,
        'head_dim': cfg.head_dim,
        'intermediate_size': max(kind.mlp_width for kind in cfg.layer_kinds()) or 4 * cfg.width,
        'max_position_embeddings': cfg.max_length,
        'mlp_hidden_act': cfg.activation,
        'mlp_bias': cfg.mlp_bias,
        'attention_bias': False,
        'num_nextn_predict_layers': 0,
        'layer_norm_epsilon': cfg.norm_eps,
        'tie_word_embeddings': False,
    }
    if space is not None:
        config |= write_space(space, SPACE_FIELDS) | {'time_step_min': space.steps[0]}
    if experts is not None:
        config |= {
            'n_routed_experts': experts.count,
            'num_experts_per_tok': experts.per_token,
            'moe_intermediate_size': experts.width,
            'norm_topk_prob': experts.normalized,
            'routed_scaling_factor': experts.scale,
            'n_group': experts.groups,
            'topk_group': experts.top_groups,
            'n_shared_experts': 1,
            'moe_shared_expert_intermediate_size': experts.shared_width,
            'moe_latent_size': experts.latent_width,
        }
    return config


def _letter(kind: LayerKind) -> str:
    if kind.mixer != 'none':
        return 'M' if kind.mixer == 'mamba' else '*'
    return 'E' if kind.experts else '-'


NEMOTRON_H = Family('NemotronHForCausalLM', _read_nemotron_h, _write_nemotron_h, NEMOTRON_H_DIALECT)
