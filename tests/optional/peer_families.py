"""Random configs of the families with experts, states or norms of their own, from one draw after another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers

Config = dict[str, Any]
LAYER_TYPES = ('full_attention', 'sliding_attention')


class Draw:
    """One random choice after another."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random

    def pick(self, *choices: Any) -> Any:
        return choices[int(self._random.integers(len(choices)))]

    def number(self, low: int, high: int) -> int:
        """From low to high - 1."""
        return int(self._random.integers(low, high))

    def flag(self) -> bool:
        return self.pick(True, False)


def _rope(draw: Draw) -> Config:
    plain = {'rope_type': 'default'}
    yarn = {'rope_type': 'yarn', 'factor': 3.0, 'original_max_position_embeddings': draw.pick(8, 30)}
    stretched = {**yarn, 'mscale': 0.7, 'mscale_all_dim': 1.9, 'beta_slow': 0.5}
    scaling = draw.pick(plain, plain, {**yarn, 'beta_fast': 6.0}, stretched)
    return scaling | {'rope_theta': float(draw.pick(50.0, 777.0, 10000.0))}


def _ends(draw: Draw) -> Config:
    nothing = dict.fromkeys(('pad_token_id', 'bos_token_id', 'eos_token_id'))
    return {'vocab_size': draw.number(40, 150), 'tie_word_embeddings': draw.flag(), **nothing}


def _transformer(draw: Draw) -> Config:
    """What all families with attention in every layer have."""
    heads, kv_heads = draw.pick((4, 4), (6, 2), (3, 1), (8, 4), (5, 5))
    return _ends(draw) | {
        'hidden_size': heads * draw.pick(4, 6, 8),
        'num_attention_heads': heads,
        'num_key_value_heads': kv_heads,
        'num_hidden_layers': draw.pick(1, 2, 3, 5),
        'intermediate_size': draw.number(17, 60),
        'max_position_embeddings': 64,
        'rms_norm_eps': draw.pick(1e-6, 1e-2),
        'rope_parameters': _rope(draw),
        'hidden_act': draw.pick('silu', 'gelu'),
    }


def _choice(draw: Draw, count: str, grouped: bool = False) -> Config:
    """How many experts there are and how many a token goes to; in groups if asked.

    Never one: where its weight is normalized, the router's gradient is zero, and rounding all there is to compare.
    """
    wanted = draw.number(2, 4)
    if not grouped:
        return {count: draw.pick(4, 5, 6, 8), 'num_experts_per_tok': wanted}
    groups, size = draw.pick((1, 6), (2, 3), (4, 2))
    kept = draw.number(1, groups + 1)
    chosen = {count: groups * size, 'num_experts_per_tok': min(wanted, kept * size), 'n_group': groups}
    return chosen | {
        'topk_group': kept,
        'norm_topk_prob': draw.flag(),
        'routed_scaling_factor': draw.pick(1.0, 2.3),
        'moe_intermediate_size': draw.number(9, 30),
    }


def _olmo2(draw: Draw) -> Any:
    config = _transformer(draw)
    config['hidden_size'] = config['num_attention_heads'] * draw.pick(4, 6, 8)  # heads of an even width
    return transformers.Olmo2Config(**config, attention_bias=draw.flag())


def _qwen3_moe(draw: Draw) -> Any:
    return transformers.Qwen3MoeConfig(
        **_transformer(draw),
        **_choice(draw, 'num_experts'),
        head_dim=draw.pick(4, 6, 10),
        moe_intermediate_size=draw.number(9, 30),
        norm_topk_prob=draw.flag(),
        decoder_sparse_step=draw.pick(1, 1, 2),
        mlp_only_layers=draw.pick([], [0], [1]),
        attention_bias=draw.flag(),
        use_sliding_window=draw.flag(),
        sliding_window=draw.pick(2, 4, 9),
    )


def _mixtral(draw: Draw) -> Any:
    window = draw.pick(None, 2, 4, 9)
    head_dim = draw.pick(4, 6, 10)
    return transformers.MixtralConfig(
        **_transformer(draw), **_choice(draw, 'num_local_experts'), head_dim=head_dim, sliding_window=window
    )


def _gpt_oss(draw: Draw) -> Any:
    config = _transformer(draw)
    del config['hidden_act']
    types = [draw.pick(*LAYER_TYPES) for _ in range(config['num_hidden_layers'])]
    return transformers.GptOssConfig(
        **config,
        **_choice(draw, 'num_local_experts'),
        **draw.pick({}, {'layer_types': types}),
        head_dim=draw.pick(4, 6, 10),
        sliding_window=draw.pick(2, 4, 9),
        attention_bias=draw.flag(),
        swiglu_limit=draw.pick(0.7, 7.0),
        swiglu_alpha=draw.pick(1.702, 1.1),
    )


def _deepseek_v3(draw: Draw) -> Any:
    config = _transformer(draw)
    config['num_key_value_heads'] = config['num_attention_heads']
    return transformers.DeepseekV3Config(
        **config,
        **_choice(draw, 'n_routed_experts', grouped=True),
        n_shared_experts=draw.pick(1, 2),
        first_k_dense_replace=draw.pick(0, 1),
        q_lora_rank=draw.pick(None, 13),
        kv_lora_rank=draw.number(7, 20),
        qk_nope_head_dim=draw.number(3, 12),
        v_head_dim=draw.number(3, 12),
        qk_rope_head_dim=draw.pick(4, 6, 10),
        rope_interleave=draw.pick(True, True, False),
        num_nextn_predict_layers=0,
    )


def _llama4_text(draw: Draw) -> Any:
    config = _transformer(draw)
    config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': config['rope_parameters']['rope_theta']}
    return transformers.Llama4TextConfig(
        **config,
        **_choice(draw, 'num_local_experts'),
        head_dim=draw.pick(4, 6, 10),
        intermediate_size_mlp=draw.number(17, 60),
        interleave_moe_layer_step=draw.pick(1, 2),
        attention_chunk_size=draw.pick(2, 5, 64),
        no_rope_layer_interval=draw.pick(2, 3),
        use_qk_norm=draw.flag(),
        attn_temperature_tuning=draw.flag(),
        floor_scale=draw.pick(3, 8192),
        attn_scale=draw.pick(0.1, 0.7),
        attention_bias=False,  # of keys without rotary embedding its gradient is zero, and rounding all to compare
    )


def _states(draw: Draw) -> tuple[Config, int, int]:
    """What both families with states have; groups and heads of states."""
    groups = draw.pick(1, 2, 3)
    config = _ends(draw) | {
        'layer_norm_epsilon': draw.pick(1e-6, 1e-2),
        'conv_kernel': draw.pick(2, 3, 4),
        'chunk_size': draw.pick(3, 8, 64),
        'use_bias': draw.flag(),
        'use_conv_bias': draw.flag(),
        'n_groups': groups,
    }
    return config, groups, groups * draw.pick(2, 3, 4)


def _mamba2(draw: Draw) -> Any:
    config, _, heads = _states(draw)
    head_dim = 2 * draw.pick(2, 3, 5)
    return transformers.Mamba2Config(
        **config,
        num_hidden_layers=draw.pick(1, 2, 3),
        num_heads=heads,
        head_dim=head_dim,
        expand=2,
        hidden_size=heads * head_dim // 2,
        state_size=draw.number(3, 14),
        time_step_limit=draw.pick([0.0, float('inf')], [0.2, 1.0]),
        hidden_act=draw.pick('silu', 'gelu'),
    )


def _nemotron_h(draw: Draw) -> Any:
    config, _, mamba_heads = _states(draw)
    heads, kv_heads = draw.pick((4, 4), (6, 2), (3, 1))
    config['tie_word_embeddings'] = False  # transformers 5.23 does not tie them
    return transformers.NemotronHConfig(
        **config,
        **_choice(draw, 'n_routed_experts', grouped=True),
        hybrid_override_pattern=draw.pick('M*-M', 'MEM*E', '-M*', 'M-*-ME', 'E*M'),
        hidden_size=heads * draw.pick(4, 6, 8),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw.pick(4, 6, 10),
        intermediate_size=draw.number(17, 60),
        mamba_num_heads=mamba_heads,
        mamba_head_dim=draw.number(3, 9),
        ssm_state_size=draw.number(3, 14),
        moe_shared_expert_intermediate_size=draw.number(9, 30),
        mlp_bias=draw.flag(),
        moe_latent_size=draw.pick(None, 11),
        time_step_min=draw.pick(0.001, 0.4),
    )


NEW_FAMILIES: dict[str, tuple[str, Callable[[Draw], Any]]] = {
    'olmo2': ('Olmo2ForCausalLM', _olmo2),
    'qwen3_moe': ('Qwen3MoeForCausalLM', _qwen3_moe),
    'mixtral': ('MixtralForCausalLM', _mixtral),
    'gpt_oss': ('GptOssForCausalLM', _gpt_oss),
    'deepseek_v3': ('DeepseekV3ForCausalLM', _deepseek_v3),
    'llama4_text': ('Llama4ForCausalLM', _llama4_text),
    'mamba2': ('Mamba2ForCausalLM', _mamba2),
    'nemotron_h': ('NemotronHForCausalLM', _nemotron_h),
}
