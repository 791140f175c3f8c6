"""Mixtral: Mistral with experts in every layer."""

import dataclasses
from typing import Any

from jpt.models.config import Experts, LayerKind, ModelConfig
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.llama import LLAMA_DIALECT, llama_like, write_llama_like
from jpt.models.families.rope_fields import read_rope

MIXTRAL_DIALECT = dataclasses.replace(
    LLAMA_DIALECT,
    layer={
        **LLAMA_DIALECT.layer,
        'mlp.router': 'block_sparse_moe.gate',
        'mlp.experts.gate': 'block_sparse_moe.experts.{e}.w1',
        'mlp.experts.up': 'block_sparse_moe.experts.{e}.w3',
        'mlp.experts.down': 'block_sparse_moe.experts.{e}.w2',
    },
)


def _read(fields: Fields) -> ModelConfig:
    fields.ignore('output_router_logits', 'router_jitter_noise')  # noise that acts in training only
    rope = read_rope(fields, fields.integer('max_position_embeddings', 4096 * 32), default_theta=1e6)
    kind = LayerKind(rope, fields.optional_integer('sliding_window'), experts=True)
    experts = Experts(
        count=fields.integer('num_local_experts', 8),
        per_token=fields.integer('num_experts_per_tok', 2),
        width=fields.integer('intermediate_size'),
        router_aux_loss_coef=fields.number('router_aux_loss_coef', 0.001),
    )
    kinds = (kind,) * fields.integer('num_hidden_layers')
    return llama_like(
        fields, kinds, default_length=4096 * 32, norm_eps=fields.number('rms_norm_eps', 1e-5), experts=experts
    )


def _write(cfg: ModelConfig) -> dict[str, Any]:
    experts = cfg.experts
    assert experts is not None
    return write_llama_like(cfg) | {
        'intermediate_size': experts.width,
        'sliding_window': next(cfg.layer_kinds()).window,
        'num_local_experts': experts.count,
        'num_experts_per_tok': experts.per_token,
        'router_aux_loss_coef': experts.router_aux_loss_coef,
    }


MIXTRAL = Family('MixtralForCausalLM', _read, _write, MIXTRAL_DIALECT)
