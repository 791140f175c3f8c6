"""Tiny quantized models for the tests of checkpoints."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np

from jpt.checkpoint.safetensors import load_file
from jpt.checkpoint.safetensors_writer import save_file
from jpt.model import Model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.quant.formats import Format
from jpt.quant.recipes import chosen, quantized_tree, recipe_of
from jpt.quant.tensors import quantize

# Widths that blocks of 16 do not divide: 40 = 2.5 blocks.
LLAMA = {
    'model_type': 'llama', 'hidden_size': 40, 'intermediate_size': 48, 'num_hidden_layers': 2, 'vocab_size': 37,
    'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 20, 'max_position_embeddings': 64,
    'rms_norm_eps': 1e-6, 'rope_theta': 1e4, 'tie_word_embeddings': False,
}  # fmt: skip
EXPERTS = LLAMA | {
    'model_type': 'qwen3_moe', 'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 24,
    'decoder_sparse_step': 1, 'mlp_only_layers': [], 'norm_topk_prob': True,
}  # fmt: skip
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'quantized'
BLOCKS = Format('e4m3', 16, 16, inputs='block')


def whole_model(fields, dtype='bfloat16'):
    cfg = config_from_hf(fields)
    return Model(
        cfg, jax.tree.map(lambda leaf: leaf.astype(dtype), jax.jit(init, static_argnums=0)(cfg, jax.random.key(0)))
    )


def quantized_model(fields, form, pattern='layers/**', dtype='bfloat16'):
    model = whole_model(fields, dtype)
    formats = chosen(model.params, recipe_of([(pattern, form)]))
    scaled = form.inputs == 'tensor'

    def kernel(path, weight, form):
        scale = np.full(weight.shape[:-2], 0.01, np.float32) if scaled else None
        return quantize(weight, form, input_scale=scale)

    return model, dataclasses.replace(
        model, params=jax.jit(quantized_tree, static_argnums=(1, 2))(model.params, Frozen(formats), kernel)
    )


class Frozen(dict):
    """Formats by path as a static argument."""

    def __hash__(self):
        return hash(tuple(self.items()))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def files_of(directory):
    return load_file(directory / 'model.safetensors')


def changed(name, tmp_path, tensors=lambda files: None, config=lambda said: None, beside=lambda said: None):
    """A copy of a golden directory with other tensors, another quantization_config or hf_quant_config.json."""
    directory = shutil.copytree(GOLDEN / name, tmp_path / 'changed')
    files = files_of(directory)
    tensors(files)
    save_file(directory / 'model.safetensors', files)
    said = json.loads((directory / 'config.json').read_text())
    config(said['quantization_config'])
    (directory / 'config.json').write_text(json.dumps(said))
    if (directory / 'hf_quant_config.json').is_file():
        said = json.loads((directory / 'hf_quant_config.json').read_text())
        beside(said['quantization'])
        (directory / 'hf_quant_config.json').write_text(json.dumps(said))
    return directory
