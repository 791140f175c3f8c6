"""The tiny models that quantized checkpoints are made of, and the golden.npz beside each checkpoint."""

import pathlib
import shutil
from typing import Any

import numpy as np
import torch
import transformers
from make_models import build, logits_of, neutral, seed_of
from quantized_cases import OUT, Tensors
from routing import LEAST_GAP, least_gap, routings_of
from safetensors.torch import load_file
from variant import Variant

T = 12
ROTARY = {'rope_type': 'default', 'rope_theta': 10000.0}
# Two small layers, no width a multiple of 128.
LLAMA = Variant(
    'llama',
    'LlamaForCausalLM',
    {
        'hidden_size': 48,
        'intermediate_size': 80,
        'num_hidden_layers': 2,
        'vocab_size': 61,
        'num_attention_heads': 3,
        'num_key_value_heads': 1,
        'rope_parameters': ROTARY,
        'bos_token_id': 1,
        'eos_token_id': 2,
    },
)
# Blocks of 128: one or two in every matrix, and keys and values of 32 rows.
# Of both Qwen3 models.
QWEN3_SIZES: dict[str, Any] = {
    'hidden_size': 128,
    'num_hidden_layers': 1,
    'vocab_size': 43,
    'tie_word_embeddings': True,
    'num_attention_heads': 4,
    'num_key_value_heads': 1,
    'head_dim': 32,
    'rope_parameters': ROTARY,
}
QWEN3 = Variant(
    'qwen3',
    'Qwen3ForCausalLM',
    {
        **QWEN3_SIZES,
        'intermediate_size': 256,
    },
)
QWEN3_MOE = Variant(
    'qwen3_moe',
    'Qwen3MoeForCausalLM',
    {
        **QWEN3_SIZES,
        'num_experts': 2,
        'num_experts_per_tok': 1,
        'moe_intermediate_size': 128,
        'norm_topk_prob': False,
        'decoder_sparse_step': 1,
        'intermediate_size': 128,
    },
)


def bfloat16_model(variant: Variant) -> Any:
    """Random weights that keep activations of order one, the same in every environment, no choice of experts a tie."""
    tied = variant.config.get('tie_word_embeddings', False)
    for attempt in range(100):
        model = build(variant)
        random = torch.Generator().manual_seed(seed_of(f'quantized {variant.name}', attempt))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=random)
                if weight.dim() == 1:
                    weight.copy_(neutral(variant, name) + 0.3 * noise)
                else:
                    embeddings = 0.15 if tied else 0.6
                    weight.copy_(noise * (embeddings if 'embed' in name else weight.shape[-1] ** -0.5))
        if chooses_clearly(model, tokens_of(variant), 10 * LEAST_GAP):
            return model.bfloat16()
    raise RuntimeError(f'{variant.name}: every choice of weights brings some token near a tie between experts')


def chooses_clearly(model: Any, tokens: np.ndarray, gap: float) -> bool:
    routings = routings_of(model, tokens)
    return not routings or (least_gap(routings) > gap and all(routing.uses_every_expert for routing in routings))


def write_source(variant: Variant) -> pathlib.Path:
    """The directory of the bfloat16 model, with its own logits."""
    directory = fresh(variant.name)
    model = bfloat16_model(variant)
    model.save_pretrained(directory)
    write_golden(directory, variant, {name: weight.float() for name, weight in model.state_dict().items()})
    return directory


def loaded_source(variant: Variant) -> Any:
    """The bfloat16 model as read from its directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        OUT / variant.name, dtype=torch.bfloat16, attn_implementation='eager'
    ).eval()


def fresh(name: str) -> pathlib.Path:
    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def tokens_of(variant: Variant, rows: int = 2, seed: str = '') -> np.ndarray:
    """int64 [rows, T], without the first ids, which padding and ends of text use."""
    random = np.random.default_rng(seed_of(variant.name + seed))
    return random.integers(3, variant.config['vocab_size'], (rows, T))


def float32_model(variant: Variant, weights: Tensors) -> Any:
    """The model of float32 weights under the names of its state dict."""
    model = build(variant)
    model.load_state_dict(weights, strict=not variant.config.get('tie_word_embeddings'))
    return model


def stored_tensors(directory: pathlib.Path) -> Tensors:
    return {
        name: tensor for file in sorted(directory.glob('*.safetensors')) for name, tensor in load_file(file).items()
    }


def write_golden(directory: pathlib.Path, variant: Variant, weights: Tensors, **more: np.ndarray) -> None:
    """golden.npz: the tokens, the float32 logits of the model with these weights, and further arrays."""
    tokens = tokens_of(variant)
    model = float32_model(variant, weights)
    assert chooses_clearly(model, tokens, 5 * LEAST_GAP), f'{directory.name}: a token is near a tie between experts'
    logits = logits_of(model, tokens)
    arrays: dict[str, Any] = {'tokens': tokens.astype(np.int32), 'logits': logits, **more}
    np.savez_compressed(directory / 'golden.npz', **arrays)
    size = sum(path.stat().st_size for path in directory.iterdir())
    against = ''
    if directory.name != variant.name and (OUT / variant.name / 'golden.npz').exists():
        with np.load(OUT / variant.name / 'golden.npz') as file:
            against = f', off the source by {np.abs(file["logits"] - logits).max():.3f}'
    if 'logits_activations' in more:
        against += f', with activations {np.abs(more["logits_activations"] - logits).max():.3f} from without'
    print(f'{directory.name}: {size} bytes, largest logit {np.abs(logits).max():.2f}{against}')


def checkpoints() -> None:
    for variant in (LLAMA, QWEN3):
        write_source(variant)
