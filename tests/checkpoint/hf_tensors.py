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

BERT = {
    'model_type': 'bert',
    'architectures': ['BertForMaskedLM'],
    'vocab_size': 11,
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 16,
}


def llama_tensors(dtype: Any = np.float32, tied: bool = False) -> Tensors:
    """Random tensors under the names of transformers' Llama."""
    shapes: dict[str, tuple[int, ...]] = {'model.embed_tokens.weight': (11, 8), 'model.norm.weight': (8,)}
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
    shapes: dict[str, tuple[int, ...]] = {'wte.weight': (11, 8), 'wpe.weight': (16, 8), **with_bias('ln_f', 8)}
    for layer in range(2):
        start = f'h.{layer}.'
        shapes |= with_bias(start + 'ln_1', 8) | with_bias(start + 'ln_2', 8)
        shapes |= with_bias(start + 'attn.c_attn', 24, (8, 24)) | with_bias(start + 'attn.c_proj', 8, (8, 8))
        shapes |= with_bias(start + 'mlp.c_fc', 32, (8, 32)) | with_bias(start + 'mlp.c_proj', 8, (32, 8))
    return random_tensors({f'transformer.{name}': shape for name, shape in shapes.items()}, np.float32)


def bert_tensors(pooled: bool = True, tied: bool = True) -> Tensors:
    """Random tensors under the names of transformers' BERT."""
    embeddings = {'word': 11, 'position': 16, 'token_type': 2}
    shapes = {f'bert.embeddings.{name}_embeddings.weight': (rows, 8) for name, rows in embeddings.items()}
    shapes |= with_bias('bert.embeddings.LayerNorm', 8)
    for layer in range(2):
        start = f'bert.encoder.layer.{layer}.'
        for name in ('self.query', 'self.key', 'self.value', 'output.dense'):
            shapes |= with_bias(f'{start}attention.{name}', 8, (8, 8))
        shapes |= with_bias(start + 'attention.output.LayerNorm', 8) | with_bias(start + 'output.LayerNorm', 8)
        shapes |= with_bias(start + 'intermediate.dense', 12, (12, 8)) | with_bias(start + 'output.dense', 8, (8, 12))
    head = 'cls.predictions.'
    shapes |= with_bias(head + 'transform.dense', 8, (8, 8)) | with_bias(head + 'transform.LayerNorm', 8)
    shapes |= {head + 'bias': (11,)} if tied else with_bias(head + 'decoder', 11, (11, 8))
    if pooled:
        shapes |= with_bias('bert.pooler.dense', 8, (8, 8)) | with_bias('cls.seq_relationship', 2, (2, 8))
    return random_tensors(shapes, np.float32)


def with_bias(module: str, size: int, kernel: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The shapes of a module that has a weight, of the bias's shape where none is given, and a bias."""
    return {f'{module}.weight': kernel or (size,), f'{module}.bias': (size,)}


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: Any) -> Tensors:
    """Normal values, the same in every run."""
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes a file with the safetensors package, whatever the dtype, bfloat16 and FP8 included."""
    from safetensors.numpy import save_file

    save_file(tensors, str(path), {'format': 'pt'})
