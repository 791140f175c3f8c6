"""The tiny models of the golden files: one entry per family and variant.

Sizes are ragged on purpose (widths of 36 and 40, vocabularies that no power of two divides, head widths that are not
width / heads), rotary bases and norm epsilons are far from their defaults, windows are shorter than the sequence: a
field that a reader of the config forgets must show in the logits. `probes` lists config changes that must move the
logits by at least a hundred tolerances, `close_probes` by five; the maker asserts it. The files hold data only: the
names of transformers' classes are strings, so that reading them needs no torch. Dense transformers are here, mixtures
of experts in moe_variants.py and shared_expert_variants.py, state-space models in hybrid_variants.py.
"""

from typing import Any

from hybrid_variants import HYBRID_VARIANTS
from moe_variants import MOE_VARIANTS
from shared_expert_variants import SHARED_EXPERT_VARIANTS
from variant import DROP, Json, Variant, old, rope

LLAMA = {
    'vocab_size': 101,
    'hidden_size': 36,
    'intermediate_size': 52,
    'num_hidden_layers': 2,
    'num_attention_heads': 6,
    'num_key_value_heads': 3,
    'head_dim': 8,
    'max_position_embeddings': 64,
    'rms_norm_eps': 3e-3,
    'rope_parameters': rope(200.0),
    'bos_token_id': 1,
    'eos_token_id': None,
}
EPS = {'rms_norm_eps': 1e-6}
THETA = {'rope_parameters': rope(10000.0)}


def llama(name: str, *, probes: tuple[Json, ...] = (), legacy: Json | None = None, **config: Any) -> Variant:
    fields = {key: config.pop(key) for key in ('eos', 'max_shard_size', 'alone') if key in config}
    return Variant(name, 'LlamaForCausalLM', {**LLAMA, **config}, (EPS, *probes), legacy, **fields)


LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 48, 'beta_fast': 2.0}
YARN_MSCALE = {
    **YARN,
    'mscale': 3.0,
    'mscale_all_dim': 1.5,
    'beta_fast': 1.7,
    'beta_slow': 0.6,
    'truncate': False,
}

LLAMA_VARIANTS = (
    llama(
        'llama',
        num_hidden_layers=3,
        eos=6,
        probes=(THETA,),
        legacy=old(rope_theta=200.0, attention_bias=DROP, mlp_bias=DROP, rope_scaling=None),
    ),
    llama(
        'llama_bias',
        vocab_size=97,
        hidden_size=40,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=10,
        attention_bias=True,
        mlp_bias=True,
        probes=(THETA,),
        legacy=old(rope_theta=200.0, head_dim=DROP, num_key_value_heads=DROP),
    ),
    llama(
        'llama_tied',
        vocab_size=113,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        tie_word_embeddings=True,
    ),
    llama(
        'llama_llama3',
        head_dim=12,
        rope_parameters=rope(200.0, **LLAMA3),
        probes=(
            THETA,
            {'rope_parameters': rope(200.0)},
            {'rope_parameters': rope(200.0, **{**LLAMA3, 'factor': 4.0})},
            {'rope_parameters': rope(200.0, **{**LLAMA3, 'high_freq_factor': 3.0})},
            {'rope_parameters': rope(200.0, **{**LLAMA3, 'low_freq_factor': 0.5})},
            {'rope_parameters': rope(200.0, **{**LLAMA3, 'original_max_position_embeddings': 16})},
        ),
        legacy=old(rope_theta=200.0, rope_scaling=LLAMA3),
        eos=4,
    ),
    llama(
        'llama_linear',
        rope_parameters=rope(200.0, rope_type='linear', factor=2.5),
        probes=({'rope_parameters': rope(200.0)},),
        # 'type' is how this key was first spelled.
        legacy=old(rope_theta=200.0, rope_scaling={'type': 'linear', 'factor': 2.5}),
    ),
    llama(
        'llama_dynamic',
        max_position_embeddings=12,
        rope_parameters=rope(200.0, rope_type='dynamic', factor=3.0),
        probes=({'rope_parameters': rope(200.0)}, {'max_position_embeddings': 16}),
        legacy=old(rope_theta=200.0, rope_scaling={'type': 'dynamic', 'factor': 3.0}),
        alone=(24, 17, 12, 9),
    ),
    llama(
        'llama_yarn',
        head_dim=16,
        max_position_embeddings=192,
        rope_parameters=rope(500.0, **YARN),
        probes=(
            {'rope_parameters': rope(500.0)},
            {'rope_parameters': rope(500.0, **{**YARN, 'attention_factor': 1.0})},
            {'rope_parameters': rope(500.0, **{**YARN, 'beta_fast': 32.0})},
            {'rope_parameters': rope(500.0, **{**YARN, 'original_max_position_embeddings': 16})},
        ),
        legacy=old(rope_theta=500.0, rope_scaling=YARN),
    ),
    llama(
        'llama_yarn_factor',
        head_dim=16,
        max_position_embeddings=192,
        rope_parameters=rope(500.0, **YARN, attention_factor=1.4),
        probes=({'rope_parameters': rope(500.0, **YARN)},),
        legacy=old(rope_theta=500.0, rope_scaling={**YARN, 'attention_factor': 1.4}),
    ),
    llama(
        'llama_yarn_mscale',
        head_dim=16,
        max_position_embeddings=192,
        rope_parameters=rope(500.0, **YARN_MSCALE),
        probes=(
            {'rope_parameters': rope(500.0, **{**YARN_MSCALE, 'mscale': 1.0})},
            {'rope_parameters': rope(500.0, **{**YARN_MSCALE, 'truncate': True})},
            {'rope_parameters': rope(500.0, **{**YARN_MSCALE, 'beta_slow': 1.0})},
        ),
        legacy=old(rope_theta=500.0, rope_scaling=YARN_MSCALE),
    ),
)

MISTRAL = {**LLAMA, 'rope_parameters': rope(300.0), 'sliding_window': None}
QWEN = {
    **LLAMA,
    'vocab_size': 109,
    'hidden_size': 40,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rope_parameters': rope(300.0),
    'bos_token_id': None,
}
QWEN2 = {key: value for key, value in QWEN.items() if key != 'head_dim'}
# Written out where no layer slides: transformers then ignores the window.
NO_WINDOW = {'use_sliding_window': False, 'sliding_window': 5, 'max_window_layers': 1}

MISTRAL_QWEN_VARIANTS = (
    Variant('mistral', 'MistralForCausalLM', MISTRAL, (EPS, THETA), old(rope_theta=300.0, head_dim=8)),
    Variant(
        'mistral_window',
        'MistralForCausalLM',
        {**MISTRAL, 'sliding_window': 5, 'vocab_size': 103},
        (EPS, {'sliding_window': 6}, {'sliding_window': None}),
        old(rope_theta=300.0),
    ),
    Variant(
        'qwen2',
        'Qwen2ForCausalLM',
        {**QWEN2, **NO_WINDOW, 'tie_word_embeddings': True},
        (EPS, THETA, {**NO_WINDOW, 'use_sliding_window': True}),
        old(rope_theta=300.0, layer_types=DROP, **NO_WINDOW),
        max_shard_size='40KB',
    ),
    Variant(
        'qwen2_window',
        'Qwen2ForCausalLM',
        {**QWEN2, 'num_hidden_layers': 4, 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 3},
        ({'sliding_window': 6}, {'max_window_layers': 2}, {'max_window_layers': 4}),
        old(rope_theta=300.0, layer_types=DROP),
    ),
    Variant(
        'qwen3',
        'Qwen3ForCausalLM',
        {**QWEN, 'num_attention_heads': 6, 'num_key_value_heads': 3, 'head_dim': 10},
        (EPS, THETA),
        old(rope_theta=300.0, layer_types=DROP, rope_scaling=None),
        eos=5,
        max_shard_size='60KB',
    ),
    Variant(
        'qwen3_mixed',
        'Qwen3ForCausalLM',
        {
            **QWEN,
            'num_hidden_layers': 3,
            'head_dim': 12,
            'attention_bias': True,
            'tie_word_embeddings': True,
            'use_sliding_window': True,
            'sliding_window': 6,
            'layer_types': ['full_attention', 'sliding_attention', 'full_attention'],
            'rope_parameters': rope(300.0, rope_type='yarn', factor=4.0, original_max_position_embeddings=16),
        },
        (EPS, {'sliding_window': 7}, {'rope_parameters': rope(300.0)}),
        old(rope_theta=300.0, rope_scaling={'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}),
    ),
)

GEMMA = {
    'vocab_size': 107,
    'hidden_size': 32,
    'intermediate_size': 44,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 12,
    'max_position_embeddings': 64,
    'rms_norm_eps': 3e-3,
    'rope_parameters': rope(200.0),
    'pad_token_id': 0,
    'bos_token_id': 2,
    'eos_token_id': None,
}
GEMMA2 = {
    **GEMMA,
    'num_hidden_layers': 5,
    'head_dim': 10,
    'sliding_window': 5,
    'query_pre_attn_scalar': 17,
    'attn_logit_softcapping': 2.0,
    'final_logit_softcapping': 4.0,
}
GEMMA3_ROPE = {
    'sliding_attention': rope(40.0),
    'full_attention': rope(900.0, rope_type='linear', factor=3.0),
}
GEMMA3_YARN = rope(
    900.0, rope_type='yarn', factor=4.0, original_max_position_embeddings=48, beta_fast=2.0, truncate=False
)
GEMMA3 = {
    **GEMMA,
    'num_hidden_layers': 7,
    'hidden_size': 24,
    'intermediate_size': 36,
    'head_dim': 10,
    'sliding_window': 5,
    'query_pre_attn_scalar': 17,
    'rope_parameters': GEMMA3_ROPE,
}

GEMMA_VARIANTS = (
    Variant(
        'gemma',
        'GemmaForCausalLM',
        GEMMA,
        (EPS, THETA, {'hidden_act': 'silu'}),
        # The first Gemma configs say "gelu" and mean the tanh approximation.
        old(rope_theta=200.0, hidden_act='gelu', tie_word_embeddings=DROP, attention_bias=DROP),
    ),
    Variant(
        'gemma2',
        'Gemma2ForCausalLM',
        GEMMA2,
        (
            EPS,
            {'sliding_window': 6},
            {'query_pre_attn_scalar': 10},
            {'attn_logit_softcapping': None},
            {'final_logit_softcapping': None},
            {'layer_types': ['full_attention', 'sliding_attention'] * 2 + ['full_attention']},
        ),
        # Published Gemma 2 configs carry both spellings of the activation.
        old(
            rope_theta=200.0,
            layer_types=DROP,
            hidden_act='gelu_pytorch_tanh',
            cache_implementation='hybrid',
            tie_word_embeddings=DROP,
        ),
        eos=7,
        close_probes=({'hidden_activation': 'gelu'},),
    ),
    Variant(
        'gemma3_text',
        'Gemma3ForCausalLM',
        GEMMA3,
        (
            EPS,
            {'sliding_window': 6},
            {'query_pre_attn_scalar': 10},
            {'rope_parameters': {**GEMMA3_ROPE, 'sliding_attention': rope(900.0)}},
            {'rope_parameters': {**GEMMA3_ROPE, 'full_attention': rope(900.0)}},
        ),
        old(
            rope_theta=900.0,
            rope_local_base_freq=40.0,
            rope_scaling={'rope_type': 'linear', 'factor': 3.0},
            layer_types=DROP,
            sliding_window_pattern=6,
            cache_implementation='hybrid',
            tie_word_embeddings=DROP,
            _sliding_window_pattern=DROP,
        ),
        close_probes=({'hidden_activation': 'gelu'},),
    ),
    Variant(
        'gemma3_irregular',
        'Gemma3ForCausalLM',
        {
            **GEMMA3,
            'num_hidden_layers': 5,
            'layer_types': ['full_attention', *['sliding_attention'] * 2, 'full_attention', 'sliding_attention'],
            'final_logit_softcapping': 5.0,
            'tie_word_embeddings': False,
            'rope_parameters': {'sliding_attention': rope(40.0), 'full_attention': GEMMA3_YARN},
        },
        (
            {'final_logit_softcapping': None},
            {'layer_types': ['sliding_attention'] * 4 + ['full_attention']},
            # Beside the kinds of attention the field is heard, within them it is not.
            {
                'rope_parameters': {
                    'sliding_attention': rope(40.0),
                    'full_attention': GEMMA3_YARN,
                    'truncate': False,
                }
            },
        ),
    ),
)

GPT2 = {
    'vocab_size': 101,
    'n_positions': 40,
    'n_embd': 36,
    'n_layer': 2,
    'n_head': 3,
    'n_inner': 52,
    'layer_norm_epsilon': 3e-3,
    'bos_token_id': 100,
    'eos_token_id': None,
}

GPT2_VARIANTS = (
    Variant(
        'gpt2',
        'GPT2LMHeadModel',
        GPT2,
        ({'layer_norm_epsilon': 1e-6}, {'activation_function': 'relu'}),
        {
            **dict.fromkeys(('dtype', 'tie_word_embeddings', 'scale_attn_by_inverse_layer_idx'), DROP),
            **dict.fromkeys(('reorder_and_upcast_attn', 'scale_attn_weights', 'add_cross_attention'), DROP),
            'n_ctx': 40,
            'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
        },
        eos=2,
        close_probes=({'activation_function': 'gelu'},),
    ),
    Variant(
        'gpt2_untied',
        'GPT2LMHeadModel',
        {
            **GPT2,
            'n_layer': 3,
            'n_inner': None,
            'tie_word_embeddings': False,
            'activation_function': 'gelu',
            'n_embd': 24,
            'scale_attn_by_inverse_layer_idx': True,
        },
        ({'activation_function': 'relu'}, {'scale_attn_by_inverse_layer_idx': False}, {'scale_attn_weights': False}),
        close_probes=({'activation_function': 'gelu_new'},),
    ),
)

OLMO2_VARIANTS = (
    Variant(
        'olmo2',
        'Olmo2ForCausalLM',
        {**{key: value for key, value in LLAMA.items() if key != 'head_dim'}, 'pad_token_id': None},
        (EPS, THETA),
        old(rope_theta=200.0, rope_scaling=None),
        eos=5,
    ),
)

DENSE_VARIANTS = LLAMA_VARIANTS + MISTRAL_QWEN_VARIANTS + GEMMA_VARIANTS + GPT2_VARIANTS + OLMO2_VARIANTS
VARIANTS = DENSE_VARIANTS + MOE_VARIANTS + SHARED_EXPERT_VARIANTS + HYBRID_VARIANTS
