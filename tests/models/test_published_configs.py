"""Published config.json files beyond those in tests/golden/published_configs.json: what is read, and how large it is.

Sizes are those that the Hub shows, or sums over the tensors that the files hold. Fields about training and serving that
the files have are kept here, since reading must get past them.
"""

import collections
import json
import math
import pathlib
from typing import Any

import pytest

from jpt.models.config import ModelConfig
from jpt.models.families import config_from_hf, config_to_hf
from jpt.models.families.bert import BERT
from jpt.models.names import leaves

Json = dict[str, Any]
LISTED = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'published_configs.json').read_text())
AUTO_MAP = {'AutoConfig': 'configuration.Config', 'AutoModelForCausalLM': 'modeling.Model'}
FP8 = {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8', 'weight_block_size': [128, 128]}

# DeepSeek-V3 and R1 say the same.
DEEPSEEK_V3: Json = {
    'model_type': 'deepseek_v3', 'architectures': ['DeepseekV3ForCausalLM'], 'auto_map': AUTO_MAP,
    'attention_bias': False, 'attention_dropout': 0.0, 'aux_loss_alpha': 0.001, 'bos_token_id': 0, 'eos_token_id': 1,
    'ep_size': 1, 'first_k_dense_replace': 3, 'hidden_act': 'silu', 'hidden_size': 7168, 'initializer_range': 0.02,
    'intermediate_size': 18432, 'kv_lora_rank': 512, 'max_position_embeddings': 163840, 'moe_intermediate_size': 2048,
    'moe_layer_freq': 1, 'n_group': 8, 'n_routed_experts': 256, 'n_shared_experts': 1, 'norm_topk_prob': True,
    'num_attention_heads': 128, 'num_experts_per_tok': 8, 'num_hidden_layers': 61, 'num_key_value_heads': 128,
    'num_nextn_predict_layers': 0, 'pretraining_tp': 1, 'q_lora_rank': 1536, 'qk_nope_head_dim': 128,
    'qk_rope_head_dim': 64, 'rms_norm_eps': 1e-6, 'rope_theta': 10000, 'routed_scaling_factor': 2.5,
    'rope_scaling': {
        'beta_fast': 32, 'beta_slow': 1, 'factor': 40, 'mscale': 1.0, 'mscale_all_dim': 1.0,
        'original_max_position_embeddings': 4096, 'type': 'yarn',
    },
    'scoring_func': 'sigmoid', 'seq_aux': True, 'tie_word_embeddings': False, 'topk_group': 4,
    'topk_method': 'noaux_tc', 'torch_dtype': 'bfloat16', 'transformers_version': '4.33.1', 'use_cache': True,
    'v_head_dim': 128, 'vocab_size': 129280,
}  # fmt: skip
KIMI_K2: Json = DEEPSEEK_V3 | {
    'model_type': 'kimi_k2', 'bos_token_id': 163584, 'eos_token_id': 163585, 'first_k_dense_replace': 1,
    'max_position_embeddings': 131072, 'n_group': 1, 'n_routed_experts': 384, 'num_attention_heads': 64,
    'num_key_value_heads': 64, 'rope_theta': 50000.0, 'routed_scaling_factor': 2.827, 'topk_group': 1,
    'transformers_version': '4.48.3', 'vocab_size': 163840,
    'rope_scaling': {
        'beta_fast': 1.0, 'beta_slow': 1.0, 'factor': 32.0, 'mscale': 1.0, 'mscale_all_dim': 1.0,
        'original_max_position_embeddings': 4096, 'type': 'yarn',
    },
}  # fmt: skip
SCOUT: Json = {
    'model_type': 'llama4', 'architectures': ['Llama4ForConditionalGeneration'], 'boi_token_index': 200080,
    'eoi_token_index': 200081, 'image_token_index': 200092, 'tie_word_embeddings': False,
    'transformers_version': '4.51.0',
    'text_config': {
        'model_type': 'llama4_text', 'attention_bias': False, 'attention_chunk_size': 8192, 'attention_dropout': 0.0,
        'attn_scale': 0.1, 'attn_temperature_tuning': 4, 'bos_token_id': 200000,
        'eos_token_id': [200001, 200007, 200008], 'floor_scale': 8192, 'for_llm_compressor': False, 'head_dim': 128,
        'hidden_act': 'silu', 'hidden_size': 5120, 'initializer_range': 0.02, 'interleave_moe_layer_step': 1,
        'intermediate_size': 8192, 'intermediate_size_mlp': 16384, 'max_position_embeddings': 262144,
        'moe_layers': list(range(48)), 'no_rope_layers': [1, 1, 1, 0] * 12, 'num_attention_heads': 40,
        'num_experts_per_tok': 1, 'num_hidden_layers': 48, 'num_key_value_heads': 8, 'num_local_experts': 16,
        'output_router_logits': False, 'pad_token_id': 200018, 'rms_norm_eps': 1e-5,
        'rope_scaling': {
            'factor': 8.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'rope_type': 'llama3',
            'original_max_position_embeddings': 8192,
        },
        'rope_theta': 500000.0, 'router_aux_loss_coef': 0.001, 'router_jitter_noise': 0.0, 'torch_dtype': 'bfloat16',
        'use_cache': True, 'use_qk_norm': True, 'vocab_size': 202048,
    },
    'vision_config': {'model_type': 'llama4_vision_model', 'hidden_size': 1408, 'num_hidden_layers': 34},
}  # fmt: skip
GEMMA3_4B: Json = {
    'model_type': 'gemma3', 'architectures': ['Gemma3ForConditionalGeneration'], 'boi_token_index': 255999,
    'eoi_token_index': 256000, 'eos_token_id': [1, 106], 'image_token_index': 262144, 'initializer_range': 0.02,
    'mm_tokens_per_image': 256, 'torch_dtype': 'bfloat16', 'transformers_version': '4.50.0.dev0',
    'text_config': {
        'model_type': 'gemma3_text', 'hidden_size': 2560, 'intermediate_size': 10240, 'num_hidden_layers': 34,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
    },
    'vision_config': {'model_type': 'siglip_vision_model', 'hidden_size': 1152, 'num_hidden_layers': 27},
}  # fmt: skip
NEMOTRON_3_NANO: Json = {
    'model_type': 'nemotron_h', 'architectures': ['NemotronHForCausalLM'], 'auto_map': AUTO_MAP,
    'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1, 'chunk_size': 128, 'conv_kernel': 4,
    'eos_token_id': 2, 'expand': 2, 'head_dim': 128, 'hidden_dropout': 0.0, 'hidden_size': 2688,
    'hybrid_override_pattern': 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME', 'initializer_range': 0.02,
    'intermediate_size': 1856, 'layer_norm_epsilon': 1e-5, 'mamba_head_dim': 64, 'mamba_hidden_act': 'silu',
    'mamba_num_heads': 64, 'mamba_proj_bias': False, 'mamba_ssm_cache_dtype': 'float32',
    'max_position_embeddings': 262144, 'mlp_bias': False, 'mlp_hidden_act': 'relu2', 'moe_intermediate_size': 1856,
    'moe_shared_expert_intermediate_size': 3712, 'n_group': 1, 'n_groups': 8, 'n_routed_experts': 128,
    'n_shared_experts': 1, 'norm_eps': 1e-5, 'norm_topk_prob': True, 'num_attention_heads': 32,
    'num_experts_per_tok': 6, 'num_hidden_layers': 52, 'num_key_value_heads': 2, 'num_logits_to_keep': 1,
    'pad_token_id': 0, 'partial_rotary_factor': 1.0, 'rescale_prenorm_residual': True, 'residual_in_fp32': False,
    'rope_theta': 10000, 'routed_scaling_factor': 2.5, 'sliding_window': None, 'ssm_state_size': 128,
    'tie_word_embeddings': False, 'time_step_floor': 0.0001, 'time_step_max': 0.1, 'time_step_min': 0.001,
    'topk_group': 1, 'torch_dtype': 'bfloat16', 'transformers_version': '4.55.4', 'use_bias': False,
    'use_cache': True, 'use_conv_bias': True, 'use_mamba_kernels': True, 'vocab_size': 131072,
}  # fmt: skip
# As converted for transformers: the first release has fields and files of its own.
MAMBA2_2_7B: Json = {
    'model_type': 'mamba2', 'architectures': ['Mamba2ForCausalLM'], 'bos_token_id': 0, 'chunk_size': 256,
    'conv_kernel': 4, 'eos_token_id': 0, 'expand': 2, 'head_dim': 64, 'hidden_act': 'silu', 'hidden_size': 2560,
    'initializer_range': 0.1, 'layer_norm_epsilon': 1e-5, 'n_groups': 1, 'norm_before_gate': False, 'num_heads': 80,
    'num_hidden_layers': 64, 'pad_token_id': 0, 'rescale_prenorm_residual': False, 'residual_in_fp32': True,
    'rms_norm': True, 'state_size': 128, 'tie_word_embeddings': True, 'time_step_floor': 0.0001,
    'time_step_limit': [0.0, math.inf], 'time_step_max': 0.1, 'time_step_min': 0.001, 'time_step_rank': 160,
    'use_bias': False, 'use_cache': True, 'use_conv_bias': True, 'vocab_size': 50288,
}  # fmt: skip
BERT_BASE: Json = {
    'model_type': 'bert', 'architectures': ['BertForMaskedLM'], 'attention_probs_dropout_prob': 0.1,
    'gradient_checkpointing': False, 'hidden_act': 'gelu', 'hidden_dropout_prob': 0.1, 'hidden_size': 768,
    'initializer_range': 0.02, 'intermediate_size': 3072, 'layer_norm_eps': 1e-12, 'max_position_embeddings': 512,
    'num_attention_heads': 12, 'num_hidden_layers': 12, 'pad_token_id': 0, 'position_embedding_type': 'absolute',
    'transformers_version': '4.6.0.dev0', 'type_vocab_size': 2, 'use_cache': True, 'vocab_size': 30522,
}  # fmt: skip
BERT_MULTILINGUAL: Json = BERT_BASE | {
    'directionality': 'bidi', 'pooler_fc_size': 768, 'pooler_num_attention_heads': 12, 'pooler_num_fc_layers': 3,
    'pooler_size_per_head': 128, 'pooler_type': 'first_token_transform', 'vocab_size': 119547,
}  # fmt: skip


def scout_vision() -> int:
    """The parameters of Llama 4 Scout that are not its text model's, as its files list them."""
    width, inner = 1408, 5632
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    ends = width + 577 * width + 588 * width + 4 * width
    return ends + 34 * layer + 4096 * 5632 + 4096 * 4096 + 4096 * 5120


def nemotron_size() -> int:
    """The parameters of Nemotron 3 Nano, layer by layer: 31.6 billion."""
    attention = 2688 * (32 + 2 * 2) * 128 + 32 * 128 * 2688
    inner, conv = 64 * 64, 64 * 64 + 2 * 8 * 128
    mamba = 2688 * (inner + conv + 64) + conv * (4 + 1) + 3 * 64 + inner + inner * 2688
    experts = 128 * (2688 + 1) + 128 * 2 * 2688 * 1856 + 2 * 2688 * 3712
    return 6 * attention + 23 * mamba + 23 * experts + 53 * 2688 + 2 * 131072 * 2688


# Name -> config, parameters, layers, width, and how many layers there are of which kind.
PUBLISHED: dict[str, tuple[Json, int, int, int, Json]] = {
    'DeepSeek-V3': (DEEPSEEK_V3, 671_026_419_200, 61, 7168, {'dense': 3, 'experts': 58}),
    'Kimi-K2': (KIMI_K2, 1_026_408_232_448, 61, 7168, {'dense': 1, 'experts': 60}),
    'Llama-4-Scout': (SCOUT, 108_641_793_536 - scout_vision(), 48, 5120, {'experts': 48, 'chunk': 36}),
    'gemma-3-4b': (GEMMA3_4B, 3_880_263_168, 34, 2560, {'dense': 34, 'window': 29}),
    'Nemotron-3-Nano': (NEMOTRON_3_NANO, nemotron_size(), 52, 2688, {'mamba': 23, 'experts': 23, 'neither': 29}),
    'mamba2-2.7b': (MAMBA2_2_7B, 2_702_599_680, 64, 2560, {'mamba': 64, 'neither': 64}),
}
# The same of files whose sizes test_golden.py compares.
KINDS: dict[str, tuple[int, int, Json]] = {
    'Qwen3-30B-A3B': (48, 2048, {'experts': 48}),
    'Mixtral-8x7B-v0.1': (32, 4096, {'experts': 32}),
    'OLMo-2-1124-7B': (32, 4096, {'dense': 32}),
    'gpt-oss-20b': (24, 2880, {'experts': 24, 'window': 12}),
    'Moonlight-16B-A3B': (27, 2048, {'dense': 1, 'experts': 26}),
    'Mamba-Codestral-7B-v0.1': (64, 4096, {'mamba': 64, 'neither': 64}),
    'Nemotron-H-8B-Base-8K': (52, 4096, {'mamba': 24, 'dense': 24, 'neither': 28}),
}


def kinds_of(cfg: ModelConfig) -> Json:
    """How many layers have a dense MLP, experts or neither, a Mamba mixer, a window, a chunk."""
    counts: collections.Counter[str] = collections.Counter()
    for kind in cfg.layer_kinds():
        counts['experts' if kind.experts else 'dense' if kind.mlp_width else 'neither'] += 1
        has = {'mamba': kind.mixer == 'mamba', 'window': kind.window is not None, 'chunk': kind.chunk is not None}
        counts.update(name for name, value in has.items() if value)
    return dict(counts)


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_read_and_gives_its_size(name: str) -> None:
    config, size, layers, width, kinds = PUBLISHED[name]
    cfg = config_from_hf(config)
    assert (cfg.num_layers, cfg.width, kinds_of(cfg)) == (layers, width, kinds)
    assert sum(math.prod(leaf.shape) for leaf in leaves(cfg)) == size
    assert config_from_hf(json.loads(json.dumps(config_to_hf(cfg)))) == cfg


@pytest.mark.parametrize('name', KINDS)
def test_published_layers_are_of_their_kinds(name: str) -> None:
    layers, width, kinds = KINDS[name]
    cfg = config_from_hf(LISTED[name]['config'])
    assert (cfg.num_layers, cfg.width, kinds_of(cfg)) == (layers, width, kinds)


@pytest.mark.parametrize(('config', 'size'), [(BERT_BASE, 110_106_428), (BERT_MULTILINGUAL, 178_566_653)])
def test_published_bert_has_its_pooler_once_its_tensors_are_seen(config: Json, size: int) -> None:
    cfg = config_from_hf(config)
    cfg = BERT.completed(cfg, ['bert.embeddings.LayerNorm.weight', 'bert.pooler.dense.weight'])
    assert sum(math.prod(leaf.shape) for leaf in leaves(cfg)) == size


def test_kimi_k2_is_read_and_written_as_the_model_that_it_computes() -> None:
    """transformers knows no model_type kimi_k2; DeepSeek-V3's is known to every reader."""
    cfg = config_from_hf(KIMI_K2)
    written = config_to_hf(cfg)
    assert (written['model_type'], written['architectures']) == ('deepseek_v3', ['DeepseekV3ForCausalLM'])
    assert config_from_hf(written) == cfg == config_from_hf(KIMI_K2 | {'model_type': 'deepseek_v3'})


@pytest.mark.parametrize('config', [DEEPSEEK_V3, KIMI_K2, SCOUT], ids=lambda config: config['model_type'])
def test_weights_in_fp8_are_refused_by_name(config: Json) -> None:
    with pytest.raises(ValueError, match=r"quantization_config=.*'fp8'.*unquantized only"):
        config_from_hf(config | {'quantization_config': FP8})
    assert config_from_hf(config | {'quantization_config': None}) == config_from_hf(config)


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        ('nemotron_h', {'attention_bias': True}),
        ('nemotron_h', {'mamba_proj_bias': True}),
        ('nemotron_h', {'tie_word_embeddings': True}),
        ('nemotron_h', {'sliding_window': 64}),
        ('nemotron_h', {'norm_eps': 1e-6}),
        ('nemotron_h', {'rms_norm_eps': 1e-6}),
        ('nemotron_h', {'time_step_limit': [0.0, 0.5]}),
        ('nemotron_h', {'n_shared_experts': 2}),
        ('mamba2', {'rms_norm': False}),
        ('bert', {'directionality': 'left'}),
        ('llama4_text', {'attn_temperature_tuning': 'no'}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_fields_that_would_change_the_computation_are_not_passed_over(name: str, change: Json) -> None:
    configs = {'nemotron_h': NEMOTRON_3_NANO, 'mamba2': MAMBA2_2_7B, 'bert': BERT_BASE}
    config = configs.get(name, SCOUT['text_config'])
    with pytest.raises(ValueError, match=rf'config\.json: {next(iter(change))}='):
        config_from_hf(config | change)
