"""Checkpoints of made-up weights, for benchmarks that read and write files."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jpt.checkpoint.hf_export import tensors_of
from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.shards import ShardedWriter
from jpt.models.config import ModelConfig
from jpt.models.families import config_from_hf

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def llama_config(gigabytes: float, width: int, mlp: int, vocab: int, heads: int) -> dict[str, Any]:
    """A Llama with eight heads of keys and values and as many layers as make it so large in bfloat16."""
    layer = 2 * (2 * width**2 + 2 * width * (8 * width // heads) + 3 * width * mlp)
    return {
        'model_type': 'llama',
        'architectures': ['LlamaForCausalLM'],
        'vocab_size': vocab,
        'hidden_size': width,
        'intermediate_size': mlp,
        'num_hidden_layers': max(1, round((gigabytes * 1e9 - 4 * vocab * width) / layer)),
        'num_attention_heads': heads,
        'num_key_value_heads': 8,
        'max_position_embeddings': 8192,
        'rms_norm_eps': 1e-5,
        'tie_word_embeddings': False,
        'dtype': 'bfloat16',
    }


def normal_values() -> np.ndarray:
    """bfloat16 of spread 0.02."""
    return (0.02 * np.random.default_rng(0).standard_normal(2**24, np.float32)).astype(BFLOAT16)


def any_values() -> np.ndarray:
    """bfloat16 of random bits: NaN and infinities too."""
    return np.random.default_rng(0).integers(0, 2**16, 2**25, np.uint16).view(BFLOAT16)


def write_checkpoint(directory: Path, config: dict[str, Any], values: np.ndarray, shard: str) -> ModelConfig:
    """Writes a Hugging Face directory whose tensors are `values`, again and again, each from another place on."""
    directory.mkdir(parents=True)
    (directory / 'config.json').write_text(json.dumps(config))
    cfg = config_from_hf(config)
    specs = {}
    for name, parts in tensors_of(cfg).items():
        specs[name] = TensorSpec(BFLOAT16, parts[0].source.stored_shape(parts[0].shape))
    random = np.random.default_rng(1)
    with ShardedWriter(directory, specs, shard) as writer:
        for name, spec in specs.items():
            start = int(random.integers(0, 2**20))
            writer.write(name, np.resize(values[start:], spec.shape))
    return cfg
