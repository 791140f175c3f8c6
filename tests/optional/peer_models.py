"""Random transformers models for the peer tests: a seed fixes family, sizes, options, weights and tokens."""

from typing import Any

import numpy as np
import torch
import transformers

FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'gpt2')
LAYER_TYPES = ('full_attention', 'sliding_attention')


def random_config(family: str, seed: int) -> transformers.PretrainedConfig:
    """A config of this family whose sizes and options come from the seed."""
    random = np.random.default_rng([seed, FAMILIES.index(family)])

    def pick(*choices: Any) -> Any:
        return choices[int(random.integers(len(choices)))]

    heads, kv_heads = pick((4, 4), (6, 2), (3, 1), (8, 4), (5, 5))
    width = heads * pick(4, 6, 8)
    layers = pick(1, 2, 3, 5, 8)
    config: dict[str, Any] = {'vocab_size': int(random.integers(40, 150)), 'tie_word_embeddings': pick(True, False)}
    if family == 'gpt2':
        config |= {'n_embd': width, 'n_head': heads, 'n_layer': layers, 'n_inner': pick(None, 33)}
        config |= {'n_positions': 48, 'activation_function': pick('gelu_new', 'gelu', 'relu')}
        config |= {'layer_norm_epsilon': pick(1e-5, 1e-2), 'bos_token_id': None, 'eos_token_id': None}
        return transformers.GPT2Config(**config)
    config |= {'hidden_size': width, 'num_hidden_layers': layers, 'intermediate_size': int(random.integers(17, 60))}
    config |= {'num_attention_heads': heads, 'num_key_value_heads': kv_heads, 'head_dim': pick(4, 6, 10, 16)}
    config |= {'max_position_embeddings': pick(16, 64), 'rms_norm_eps': pick(1e-6, 1e-2), 'pad_token_id': None}
    config |= {'bos_token_id': None, 'eos_token_id': None}
    theta = float(pick(50.0, 777.0, 10000.0))
    scaled = random_scaling(pick, theta, config['max_position_embeddings'])
    config['rope_parameters'] = scaled
    # Not 1: the gradient of queries and keys is then zero, and float32 rounding all that there is to compare.
    window = pick(2, 4, 9, 64)
    types = [pick(*LAYER_TYPES) for _ in range(layers)]
    if family in ('llama', 'mistral', 'qwen2', 'qwen3'):
        config['hidden_act'] = pick('silu', 'gelu', 'gelu_pytorch_tanh', 'relu')
    if family in ('llama', 'qwen3', 'gemma', 'gemma2', 'gemma3_text'):
        config['attention_bias'] = pick(True, False)
    if family == 'llama':
        config['mlp_bias'] = pick(True, False)
    if family == 'mistral':
        config['sliding_window'] = pick(None, window)
    if family in ('qwen2', 'qwen3'):
        config |= {'use_sliding_window': pick(True, False), 'sliding_window': window}
        config |= pick({'max_window_layers': int(random.integers(0, layers + 1))}, {'layer_types': types})
        if not config['use_sliding_window']:
            config.pop('layer_types', None)
    if family in ('gemma2', 'gemma3_text'):
        config |= {'sliding_window': window, 'query_pre_attn_scalar': int(random.integers(3, 40))}
        config |= {'final_logit_softcapping': pick(None, 3.0), 'attn_logit_softcapping': pick(None, 1.5)}
        config |= pick({}, {'layer_types': types})
        config |= {'hidden_activation': pick('gelu_pytorch_tanh', 'gelu', 'silu')}
    if family == 'gemma3_text':
        plain = {'rope_type': 'default', 'rope_theta': float(pick(20.0, 10000.0))}
        config['rope_parameters'] = {'sliding_attention': plain, 'full_attention': scaled}
    return getattr(transformers, CLASSES[family][0])(**config)


CLASSES = {
    'llama': ('LlamaConfig', 'LlamaForCausalLM'),
    'mistral': ('MistralConfig', 'MistralForCausalLM'),
    'qwen2': ('Qwen2Config', 'Qwen2ForCausalLM'),
    'qwen3': ('Qwen3Config', 'Qwen3ForCausalLM'),
    'gemma': ('GemmaConfig', 'GemmaForCausalLM'),
    'gemma2': ('Gemma2Config', 'Gemma2ForCausalLM'),
    'gemma3_text': ('Gemma3TextConfig', 'Gemma3ForCausalLM'),
    'gpt2': ('GPT2Config', 'GPT2LMHeadModel'),
}


def random_scaling(pick: Any, theta: float, length: int) -> dict[str, Any]:
    """Rotary parameters of any kind that jpt computes."""
    yarn = {'rope_type': 'yarn', 'factor': 3.0, 'original_max_position_embeddings': pick(8, 30)}
    llama3 = {'rope_type': 'llama3', 'factor': 6.0, 'original_max_position_embeddings': length // 2}
    scaling = pick(
        {'rope_type': 'default'},
        {'rope_type': 'default'},
        {'rope_type': 'linear', 'factor': 1.7},
        {'rope_type': 'dynamic', 'factor': 2.3},
        {**llama3, 'low_freq_factor': 1.0, 'high_freq_factor': 3.0},
        {**yarn, 'beta_fast': 6.0},
        {**yarn, 'mscale': 0.7, 'mscale_all_dim': 1.9, 'beta_slow': 0.5},
        {**yarn, 'attention_factor': 0.8},
    )
    return {**scaling, 'rope_theta': theta}


def random_model(config: transformers.PretrainedConfig, seed: int) -> Any:
    """The model of a config in float32 and evaluation mode, with weights of which every one matters."""
    config._attn_implementation = 'eager'
    model = getattr(transformers, CLASSES[config.model_type][1])(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.dim() > 1:
                weight.copy_(0.15 * noise)
            elif 'Gemma' not in type(model).__name__ and name.endswith('weight'):
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(0.2 * noise)
    return model


def random_tokens(config: transformers.PretrainedConfig, seed: int) -> np.ndarray:
    """int64 [B, T] of random sizes."""
    random = np.random.default_rng([seed, 7])
    shape = int(random.integers(1, 4)), int(random.integers(9, 40))
    return random.integers(0, config.vocab_size, shape)
