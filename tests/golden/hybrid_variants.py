"""Golden models with state-space layers: Mamba-2, and Nemotron-H with and without experts."""

from variant import DROP, Json, Variant, old

# Chunks are shorter than the rows: the state passes from chunk to chunk.
MAMBA2: Json = {
    'vocab_size': 101,
    'hidden_size': 36,
    'num_hidden_layers': 3,
    'num_heads': 6,
    'head_dim': 12,
    'state_size': 10,
    'n_groups': 1,
    'expand': 2,
    'conv_kernel': 4,
    'chunk_size': 5,
    'layer_norm_epsilon': 3e-3,
    'tie_word_embeddings': True,
    'bos_token_id': 1,
    'eos_token_id': None,
    'pad_token_id': None,
}
EPS = {'layer_norm_epsilon': 1e-6}
NO_LIMIT = [0.0, float('inf')]
# The older dialect says the same of these models, and spells an unlimited step as json does.
OLD_MAMBA = {**old(), 'time_step_limit': NO_LIMIT}

MAMBA2_VARIANTS = (
    Variant('mamba2', 'Mamba2ForCausalLM', MAMBA2, (EPS, {'hidden_act': 'gelu'}), OLD_MAMBA, eos=5),
    # The decoding step of transformers does not limit the time step.
    Variant(
        'mamba2_groups',
        'Mamba2ForCausalLM',
        {
            **MAMBA2,
            'vocab_size': 107,
            'hidden_size': 28,
            'num_hidden_layers': 2,
            'num_heads': 8,
            'head_dim': 7,
            'state_size': 9,
            'n_groups': 2,
            'conv_kernel': 3,
            'chunk_size': 7,
            'use_bias': True,
            'use_conv_bias': False,
            'tie_word_embeddings': False,
            'time_step_limit': [0.4, 1.5],
        },
        (EPS, {'time_step_limit': NO_LIMIT}, {'time_step_limit': [0.4, float('inf')]}),
        old(),
        cached=False,
    ),
)

NEMOTRON_H: Json = {
    'vocab_size': 101,
    'hidden_size': 36,
    'layers_block_type': [
        *('linear_attention', 'mlp', 'linear_attention', 'full_attention'),
        *('mlp', 'linear_attention'),
    ],
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 10,
    'intermediate_size': 40,
    'mamba_num_heads': 6,
    'mamba_head_dim': 8,
    'n_groups': 2,
    'ssm_state_size': 10,
    'conv_kernel': 4,
    'chunk_size': 5,
    'max_position_embeddings': 64,
    'layer_norm_epsilon': 3e-3,
    'bos_token_id': 1,
    'eos_token_id': None,
    'pad_token_id': 0,
}
# The published files have the pattern and the number of layers, and no word of experts where there are none.
NO_EXPERTS = dict.fromkeys(
    (
        *('moe_intermediate_size', 'moe_latent_size', 'moe_shared_expert_intermediate_size'),
        *('moe_shared_expert_overlap', 'n_group', 'n_routed_experts', 'n_shared_experts', 'norm_topk_prob'),
        *('num_experts_per_tok', 'routed_scaling_factor', 'topk_group', 'output_router_logits'),
    ),
    DROP,
)


def old_nemotron(pattern: str, **changes: object) -> Json:
    return {
        **OLD_MAMBA,
        'layers_block_type': DROP,
        'mtp_layers_block_type': DROP,
        'num_nextn_predict_layers': DROP,
        'hybrid_override_pattern': pattern,
        'num_hidden_layers': len(pattern),
        'rms_norm_eps': 3e-3,
        **changes,
    }


NEMOTRON_H_VARIANTS = (
    Variant(
        'nemotron_h',
        'NemotronHForCausalLM',
        NEMOTRON_H,
        (EPS, {'mlp_hidden_act': 'silu'}, {'mamba_hidden_act': 'gelu'}),
        old_nemotron('M-M*-M', **NO_EXPERTS),
        eos=5,
    ),
    # The time step has a floor here, which transformers' decoding step leaves out.
    Variant(
        'nemotron_h_moe',
        'NemotronHForCausalLM',
        {
            **NEMOTRON_H,
            'vocab_size': 103,
            'hidden_size': 28,
            'layers_block_type': ['linear_attention', 'moe', 'full_attention', 'moe', 'linear_attention'],
            'num_attention_heads': 3,
            'num_key_value_heads': 1,
            'head_dim': 12,
            'mamba_num_heads': 9,
            'mamba_head_dim': 6,
            'n_groups': 3,
            'ssm_state_size': 7,
            'n_routed_experts': 6,
            'num_experts_per_tok': 2,
            'moe_intermediate_size': 18,
            'moe_shared_expert_intermediate_size': 26,
            'routed_scaling_factor': 2.5,
            'norm_topk_prob': True,
            'time_step_min': 0.5,
        },
        (
            EPS,
            {'time_step_min': 0.001},
            {'routed_scaling_factor': 1.0},
            {'norm_topk_prob': False},
            {'num_experts_per_tok': 3},
        ),
        old_nemotron('ME*EM'),
        cached=False,
    ),
    # Groups of experts, which work in a narrower space; biases wherever a field adds them.
    Variant(
        'nemotron_h_latent',
        'NemotronHForCausalLM',
        {
            **NEMOTRON_H,
            'vocab_size': 97,
            'layers_block_type': ['moe', 'linear_attention', 'full_attention', 'moe', 'mlp'],
            'n_routed_experts': 8,
            'num_experts_per_tok': 3,
            'n_group': 4,
            'topk_group': 2,
            'moe_intermediate_size': 14,
            'moe_latent_size': 20,
            'moe_shared_expert_intermediate_size': 22,
            'norm_topk_prob': False,
            'use_bias': True,
            'use_conv_bias': False,
            'mlp_bias': True,
        },
        (
            EPS,
            {'n_group': 1, 'topk_group': 1},
            {'topk_group': 3},
            {'norm_topk_prob': True},
            {'num_experts_per_tok': 2},
            {'routed_scaling_factor': 2.0},
        ),
        old_nemotron('EM*E-'),
    ),
)

HYBRID_VARIANTS = MAMBA2_VARIANTS + NEMOTRON_H_VARIANTS
