"""Nemotron-H, whose layers are each a Mamba mixer, attention, an MLP or experts."""

import math
from typing import Any

from jpt.models.config import Experts, LayerKind, ModelConfig, StateSpace, runs_of
from jpt.models.families.dialect import Dialect
from jpt.models.families.family import Family
from jpt.models.families.fields import ACTIVATION_NAMES, Fields
from jpt.models.families.mamba2 import MAMBA_LAYER, NO_EFFECT, write_space

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
_EXPERT_FIELDS = (
    'n_routed_experts', 'num_experts_per_tok', 'moe_intermediate_size', 'norm_topk_prob', 'routed_scaling_factor',
    'n_group', 'topk_group', 'moe_shared_expert_intermediate_size', 'moe_latent_size',
)  # fmt: skip


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


def _read_nemotron_h(fields: Fields) -> ModelConfig:
    fields.ignore(*NO_EFFECT, 'time_step_limit', 'residual_in_fp32', 'expand', 'mamba_proj_bias', 'attention_bias')
    fields.ignore('sliding_window', 'n_shared_experts', 'moe_shared_expert_overlap', 'num_logits_to_keep')
    fields.ignore('hidden_dropout', 'use_mamba_kernels', 'mamba_ssm_cache_dtype', 'rms_norm_eps', 'rms_norm')
    fields.ignore('mtp_layers_block_type')
    fields.ignore('output_router_logits', 'tie_word_embeddings', 'auto_map')  # the head is its own whatever it says
    fields.expect('num_nextn_predict_layers', (0, None))
    fields.ignore(*_EXPERT_FIELDS)  # written for dense patterns too
    pattern = _pattern(fields)
    mlp_width = fields.integer('intermediate_size', 21504)
    kinds = {
        'M': LayerKind(mixer='mamba'),
        '*': LayerKind(),
        '-': LayerKind(mixer='none', mlp_width=mlp_width),
        'E': LayerKind(mixer='none', experts=True),
    }
    heads, width = fields.integer('num_attention_heads', 32), fields.integer('hidden_size', 4096)
    space = StateSpace(
        num_heads=fields.integer('mamba_num_heads', 128),
        head_dim=fields.integer('mamba_head_dim', 64),
        groups=fields.integer('n_groups', 8),
        state_dim=fields.integer('ssm_state_size', 128),
        conv_width=fields.integer('conv_kernel', 4),
        activation=fields.choice('mamba_hidden_act', ACTIVATION_NAMES, 'silu'),
        bias=fields.boolean('use_bias', False),
        conv_bias=fields.boolean('use_conv_bias', True),
        steps=(fields.number('time_step_min', 0.001), math.inf),
    )
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
        experts=_experts(fields) if 'E' in pattern else None,
    )


def _experts(fields: Fields) -> Experts:
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
        config |= write_space(space) | {
            'mamba_num_heads': space.num_heads,
            'mamba_head_dim': space.head_dim,
            'ssm_state_size': space.state_dim,
            'mamba_hidden_act': space.activation,
            'time_step_min': space.steps[0],
        }
    if experts is not None:
        values = (
            experts.count, experts.per_token, experts.width, experts.normalized, experts.scale, experts.groups,
            experts.top_groups, experts.shared_width, experts.latent_width,
        )  # fmt: skip
        config |= dict(zip(_EXPERT_FIELDS, values, strict=True)) | {'n_shared_experts': 1}
    return config


def _letter(kind: LayerKind) -> str:
    if kind.mixer != 'none':
        return 'M' if kind.mixer == 'mamba' else '*'
    return 'E' if kind.experts else '-'


NEMOTRON_H = Family('NemotronHForCausalLM', _read_nemotron_h, _write_nemotron_h, NEMOTRON_H_DIALECT)
