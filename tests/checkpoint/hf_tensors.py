"""Tensors of tiny Hugging Face models, and files of them by the safetensors package, not by the code under test."""

from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

LLAMA = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 11,
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 32,
    'rms_norm_eps': 1e-5,
    'tie_word_embeddings': False,
    'bos_token_id': 1,
    'eos_token_id': 2,
}
GPT2 = {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'vocab_size': 11,
    'n_embd': 8,
    'n_head': 2,
    'n_layer': 2,
    'n_positions': 16,
}


def llama_tensors(dtype: Any = np.float32, tied: bool = False) -> Tensors:
    """Random tensors under the names of transformers' Llama."""
    shapes = {'model.embed_tokens.weight': (11, 8), 'model.norm.weight': (8,)}
    for layer in range(3):
        start = f'model.layers.{layer}.'
        shapes |= {
            start + 'self_attn.q_proj.weight': (8, 8),
            start + 'self_attn.k_proj.weight': (4, 8),
            start + 'self_attn.v_proj.weight': (4, 8),
            start + 'self_attn.o_proj.weight': (8, 8),
            start + 'mlp.gate_proj.weight': (12, 8),
            start + 'mlp.up_proj.weight': (12, 8),
            start + 'mlp.down_proj.weight': (8, 12),
            start + 'input_layernorm.weight': (8,),
            start + 'post_attention_layernorm.weight': (8,),
        }
    if not tied:
        shapes['lm_head.weight'] = (11, 8)
    return random_tensors(shapes, dtype)


def gpt2_tensors() -> Tensors:
    """Random tensors under the names of transformers' GPT-2, whose matrices are stored (in, out)."""
    shapes = {'wte.weight': (11, 8), 'wpe.weight': (16, 8), 'ln_f.weight': (8,), 'ln_f.bias': (8,)}
    for layer in range(2):
        shapes |= {
            f'h.{layer}.ln_1.weight': (8,),
            f'h.{layer}.ln_1.bias': (8,),
            f'h.{layer}.attn.c_attn.weight': (8, 24),
            f'h.{layer}.attn.c_attn.bias': (24,),
            f'h.{layer}.attn.c_proj.weight': (8, 8),
            f'h.{layer}.attn.c_proj.bias': (8,),
            f'h.{layer}.ln_2.weight': (8,),
            f'h.{layer}.ln_2.bias': (8,),
            f'h.{layer}.mlp.c_fc.weight': (8, 32),
            f'h.{layer}.mlp.c_fc.bias': (32,),
            f'h.{layer}.mlp.c_proj.weight': (32, 8),
            f'h.{layer}.mlp.c_proj.bias': (8,),
        }
    return random_tensors({f'transformer.{name}': shape for name, shape in shapes.items()}, np.float32)


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: Any) -> Tensors:
    """Normal values, the same in every run."""
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes a file with the safetensors package, whatever the dtype, bfloat16 and FP8 included."""
    from safetensors.numpy import save_file

    save_file(tensors, str(path), {'format': 'pt'})
