"""Golden models with experts: Qwen3-MoE, Mixtral, gpt-oss, DeepSeek-V3 and Llama 4.

The fields of a router are probed like all others; the maker chooses weights for which no choice of experts is near a
tie, and in which every expert is chosen by some token.
"""

from variant import DROP, Json, Variant, old, rope

BASE: Json = {
    'vocab_size': 101,
    'hidden_size': 36,
    'num_hidden_layers': 2,
    'num_attention_heads': 6,
    'num_key_value_heads': 3,
    'max_position_embeddings': 64,
    'rms_norm_eps': 3e-3,
    'rope_parameters': rope(200.0),
    'bos_token_id': 1,
    'eos_token_id': None,
    'pad_token_id': None,
}
EPS = {'rms_norm_eps': 1e-6}
THETA = {'rope_parameters': rope(10000.0)}

QWEN3_MOE: Json = {
    **BASE,
    'vocab_size': 97,
    'intermediate_size': 44,
    'moe_intermediate_size': 18,
    'head_dim': 10,
    'num_local_experts': 6,
    'num_experts_per_tok': 2,
    'norm_topk_prob': True,
    'bos_token_id': None,
}

QWEN3_MOE_VARIANTS = (
    Variant(
        'qwen3_moe',
        'Qwen3MoeForCausalLM',
        QWEN3_MOE,
        (EPS, THETA, {'norm_topk_prob': False}, {'num_experts_per_tok': 3}),
        old(
            rope_theta=200.0,
            rope_scaling=None,
            num_experts=6,
            num_local_experts=DROP,
            sliding_window=None,
            max_window_layers=2,
        ),
        eos=5,
        max_shard_size='120KB',
    ),
    # The dense layers are 0 and 2 by the step and 1 by the list.
    Variant(
        'qwen3_moe_mixed',
        'Qwen3MoeForCausalLM',
        {
            **QWEN3_MOE,
            'vocab_size': 103,
            'hidden_size': 28,
            'intermediate_size': 30,
            'moe_intermediate_size': 14,
            'num_hidden_layers': 6,
            'num_attention_heads': 4,
            'num_key_value_heads': 2,
            'head_dim': 8,
            'num_local_experts': 5,
            'num_experts_per_tok': 3,
            'norm_topk_prob': False,
            'decoder_sparse_step': 2,
            'mlp_only_layers': [1],
            'attention_bias': True,
            'tie_word_embeddings': True,
            'use_sliding_window': True,
            'sliding_window': 6,
        },
        (
            EPS,
            THETA,
            {'norm_topk_prob': True},
            {'num_experts_per_tok': 2},
            {'sliding_window': 7},
            {'use_sliding_window': False},
        ),
        old(rope_theta=200.0, num_experts=5, num_local_experts=DROP),
    ),
)

MIXTRAL: Json = {**BASE, 'intermediate_size': 22, 'num_local_experts': 4, 'num_experts_per_tok': 2}

MIXTRAL_VARIANTS = (
    Variant(
        'mixtral',
        'MixtralForCausalLM',
        MIXTRAL,
        (EPS, THETA, {'num_experts_per_tok': 1}),
        old(rope_theta=200.0, head_dim=DROP),
        eos=6,
    ),
    Variant(
        'mixtral_window',
        'MixtralForCausalLM',
        {
            **MIXTRAL,
            'vocab_size': 107,
            'hidden_size': 28,
            'intermediate_size': 18,
            'num_attention_heads': 4,
            'num_key_value_heads': 1,
            'head_dim': 12,
            'num_local_experts': 6,
            'num_experts_per_tok': 3,
            'sliding_window': 5,
        },
        (EPS, THETA, {'sliding_window': 6}, {'sliding_window': None}, {'num_experts_per_tok': 2}),
        old(rope_theta=200.0),
    ),
)

MOE_VARIANTS = QWEN3_MOE_VARIANTS + MIXTRAL_VARIANTS
