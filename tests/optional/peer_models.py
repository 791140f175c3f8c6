"""Random transformers models for the peer tests: a seed fixes family, sizes, options, weights and tokens."""

import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers
from peer_families import NEW_FAMILIES, Draw

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
sys.path.append(str(GOLDEN))
from routing import LEAST_GAP, least_gap, routings_of  # noqa: E402

FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'gpt2', *NEW_FAMILIES)
LAYER_TYPES = ('full_attention', 'sliding_attention')


def random_config(family: str, seed: int) -> transformers.PretrainedConfig:
    """A config of this family whose sizes and options come from the seed."""
    random = np.random.default_rng([seed, FAMILIES.index(family)])
    if family in NEW_FAMILIES:
        return NEW_FAMILIES[family][1](Draw(random))

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


def random_model(config: transformers.PretrainedConfig, seed: int, tokens: np.ndarray) -> Any:
    """The model of a config in float32 and evaluation mode, with weights of which every one matters.

    Drawn again until no choice of experts for these tokens is near a tie, which other arithmetic may decide otherwise.
    """
    for attempt in range(100):
        model = _drawn(config, seed + 1000 * attempt)
        if least_gap(routings_of(model, tokens)) > LEAST_GAP:
            return model
    raise RuntimeError(f'{config.model_type}, seed {seed}: 100 draws, and in each a token is near a tie')


def _drawn(config: transformers.PretrainedConfig, seed: int) -> Any:
    # A plain loop over experts: the fused form refuses widths that are no multiple of 16 bytes.
    config._attn_implementation = config._experts_implementation = 'eager'
    kind = config.model_type
    name = NEW_FAMILIES[kind][0] if kind in NEW_FAMILIES else CLASSES[kind][1]
    model = getattr(transformers, name)(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in stored(model).items():
            noise = torch.randn(weight.shape, generator=random)
            if weight.dim() > 1:
                weight.copy_((0.4 if name.endswith(WIDE) else 0.15) * noise)
            else:
                weight.copy_(_centre(model, name) + (1 if name.endswith('sinks') else 0.2) * noise)
    return model


WIDE = ('.gate.weight', 'router.weight', 'conv1d.weight')  # choices that differ, and states that remember


def _centre(model: Any, name: str) -> float:
    """Scales are about 1, but Gemma's, to which 1 is added; biases, and what has no such name, about 0."""
    scale = name.endswith('.weight') and 'Gemma' not in type(model).__name__
    return 1.0 if scale or name.endswith('.D') else 0.0


def stored(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, and what else is in a checkpoint: corrections of routers."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def random_tokens(config: transformers.PretrainedConfig, seed: int) -> np.ndarray:
    """int64 [B, T] of random sizes."""
    random = np.random.default_rng([seed, 7])
    shape = int(random.integers(1, 4)), int(random.integers(9, 40))
    return random.integers(0, config.vocab_size, shape)
