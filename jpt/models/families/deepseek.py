"""DeepSeek-V3 and R1, Moonlight, Kimi K2: latent attention, and experts chosen by corrected scores."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from jpt.models.config import Experts, Latent, LayerKind, ModelConfig, Rope
from jpt.models.families.dialect import Dialect
from jpt.models.families.family import Family
from jpt.models.families.fields import Fields
from jpt.models.families.llama import LLAMA_DIALECT, llama_like, write_llama_like
from jpt.models.families.rope_fields import read_rope

DEEPSEEK_V3_DIALECT = Dialect(
    embed=LLAMA_DIALECT.embed,
    layer_prefix=LLAMA_DIALECT.layer_prefix,
    layer={
        'attn_norm': 'input_layernorm',
        'attn.q_down': 'self_attn.q_a_proj',
        'attn.q_norm': 'self_attn.q_a_layernorm',
        'attn.q_up': 'self_attn.q_b_proj',
        'attn.q': 'self_attn.q_proj',
        'attn.kv_down': 'self_attn.kv_a_proj_with_mqa',
        'attn.kv_norm': 'self_attn.kv_a_layernorm',
        'attn.kv_up': 'self_attn.kv_b_proj',
        'attn.out': 'self_attn.o_proj',
        'mlp_norm': 'post_attention_layernorm',
        'mlp.gate': 'mlp.gate_proj',
        'mlp.up': 'mlp.up_proj',
        'mlp.down': 'mlp.down_proj',
        'mlp.router': 'mlp.gate',
        'mlp.router.correction': 'mlp.gate.e_score_correction_bias',
        'mlp.experts.gate': 'mlp.experts.{e}.gate_proj',
        'mlp.experts.up': 'mlp.experts.{e}.up_proj',
        'mlp.experts.down': 'mlp.experts.{e}.down_proj',
        'mlp.shared.gate': 'mlp.shared_experts.gate_proj',
        'mlp.shared.up': 'mlp.shared_experts.up_proj',
        'mlp.shared.down': 'mlp.shared_experts.down_proj',
    },
    final_norm=LLAMA_DIALECT.final_norm,
    mtp={'embed_norm': 'enorm', 'hidden_norm': 'hnorm', 'join': 'eh_proj', 'norm': 'shared_head.norm'},
    mtp_embed='embed_tokens',
    mtp_head='shared_head.head',
)


def _read(fields: Fields) -> ModelConfig:
    layers = fields.integer('num_hidden_layers')
    dense = fields.integer('first_k_dense_replace', 3)
    rope = read_rope(fields, fields.integer('max_position_embeddings', 4096))
    rope = dataclasses.replace(rope, interleaved=fields.boolean('rope_interleave', True))
    fields.expect('scoring_func', ('sigmoid',))
    fields.expect('topk_method', ('noaux_tc',))
    fields.expect('moe_layer_freq', (1,))
    fields.ignore('ep_size', 'seq_aux', 'pretraining_tp', 'output_router_logits', 'head_dim', 'qk_head_dim', 'auto_map')
    fields.ignore('aux_loss_alpha')
    latent = Latent(
        rank=fields.integer('kv_lora_rank', 512),
        query_rank=fields.optional_integer('q_lora_rank', 1536),
        nope_dim=fields.integer('qk_nope_head_dim', 128),
        rope_dim=fields.integer('qk_rope_head_dim', 64),
        value_dim=fields.integer('v_head_dim', 128),
    )
    width = fields.integer('moe_intermediate_size', 2048)
    experts = Experts(
        count=fields.integer('n_routed_experts', 256),
        per_token=fields.integer('num_experts_per_tok', 8),
        width=width,
        scoring='sigmoid',
        normalized=fields.boolean('norm_topk_prob', True),
        scale=fields.number('routed_scaling_factor', 2.5),
        corrected=True,
        groups=fields.optional_integer('n_group', 8) or 1,
        top_groups=fields.optional_integer('topk_group', 4) or 1,
        shared_width=width * (fields.optional_integer('n_shared_experts', 1) or 0),
    )
    modules = fields.optional_integer('num_nextn_predict_layers', 0) or 0
    for name, value in (('num_nextn_predict_layers', modules), ('first_k_dense_replace', dense)):
        if value < 0:
            raise ValueError(f'config.json: {name}={value}: expected 0 or more')
    if modules and rope.kind == 'dynamic':
        raise ValueError(
            f'config.json: num_nextn_predict_layers={modules}: such modules see texts that are shorter, for which a '
            "rope_type 'dynamic' is another one: expected 0"
        )
    if modules and dense >= layers:
        raise ValueError(
            f'config.json: num_nextn_predict_layers={modules}: such a module has experts, of which the model has none '
            '(first_k_dense_replace)'
        )
    bias = fields.boolean('attention_bias', False)
    head_dim = latent.nope_dim + latent.rope_dim
    return llama_like(
        fields,
        tuple(LayerKind(rope, experts=layer >= dense) for layer in range(layers)),
        default_length=4096,
        head_dim=head_dim,
        attention_scale=head_dim**-0.5 * _score_factor(rope),
        qkv_bias=bias,
        attention_out_bias=bias,
        latent=latent,
        experts=experts if dense < layers else None,
        mtp=(LayerKind(rope, experts=True),) * modules,
    )


def _score_factor(rope: Rope) -> float:
    """What stretching the rotary embedding adds to the scale of scores (its published configs put all of it here)."""
    if rope.kind == 'default' or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2


def _write(cfg: ModelConfig) -> dict[str, Any]:
    latent, experts, kinds = cfg.latent, cfg.experts, list(cfg.layer_kinds())
    assert latent is not None
    config = write_llama_like(cfg) | {
        'attention_bias': cfg.qkv_bias,
        'head_dim': latent.rope_dim,  # what transformers makes the rotary embedding for
        'kv_lora_rank': latent.rank,
        'q_lora_rank': latent.query_rank,
        'qk_nope_head_dim': latent.nope_dim,
        'qk_rope_head_dim': latent.rope_dim,
        'v_head_dim': latent.value_dim,
        'rope_interleave': kinds[0].rope is not None and kinds[0].rope.interleaved,
        'first_k_dense_replace': sum(not kind.experts for kind in kinds),
        'num_nextn_predict_layers': len(cfg.mtp),
    }
    if experts is None:
        return config
    return config | {
        'n_routed_experts': experts.count,
        'num_experts_per_tok': experts.per_token,
        'moe_intermediate_size': experts.width,
        'norm_topk_prob': experts.normalized,
        'routed_scaling_factor': experts.scale,
        'n_group': experts.groups,
        'topk_group': experts.top_groups,
        'n_shared_experts': experts.shared_width // experts.width,
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
    }


def _completed(cfg: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Checkpoints that other programs have saved say that there are MTP modules and have none of their tensors."""
    promised = [f'layers.{cfg.num_layers + depth}.' for depth in range(len(cfg.mtp))]
    there = any(layer in name for layer in promised for name in names)
    return cfg if there else dataclasses.replace(cfg, mtp=())


DEEPSEEK_V3 = Family('DeepseekV3ForCausalLM', _read, _write, DEEPSEEK_V3_DIALECT, _completed)
