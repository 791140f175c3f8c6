"""The face: what it refuses, and that a model saved or exported is the model that was loaded."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpt
from jpt.models.names import to_hf
from jpt.quant.dot import LoraKernel

MODELS = pathlib.Path(__file__).parent / 'golden' / 'models'


@pytest.mark.parametrize(
    ('tokens', 'positions', 'message'),
    [
        ([1, 2], None, r'tokens have shape \(2,\): expected \[B, T\]'),
        ([[1, 101]], None, 'token ids from 1 to 101: expected ids from 0 to 100'),
        ([[1] * 41], None, 'position 40: the model has embeddings of 40 positions'),
        ([[1, 2]], [[39, 40]], 'position 40: the model has embeddings of 40 positions'),
    ],
)
def test_what_has_no_logits_is_an_error(tokens, positions, message):
    """Without the last two checks the answer would be NaN."""
    with pytest.raises(ValueError, match=message):
        jpt.load(MODELS / 'gpt2').logits(tokens, positions)


@pytest.mark.parametrize('name', ['gpt2', 'qwen3', 'gemma3_text'])
def test_saved_and_exported_models_hold_the_same_bits(name, tmp_path):
    model = jpt.load(MODELS / name)
    model.save(tmp_path / 'jpt')
    model.export(tmp_path / 'hf')
    wanted = to_hf(model.config, model.params)
    for path in (tmp_path / 'jpt', tmp_path / 'hf'):
        again = jpt.load(path)
        assert again.config == model.config
        found = to_hf(again.config, again.params)
        assert found.keys() == wanted.keys()
        for tensor, values in wanted.items():
            np.testing.assert_array_equal(found[tensor], values)


@pytest.mark.parametrize(
    ('embedding', 'norm', 'expected'),
    [
        ('bfloat16', 'bfloat16', 'bfloat16'),
        ('bfloat16', 'float32', 'float32'),
        ('float8_e4m3fn', 'float16', 'float16'),
        ('float16', 'bfloat16', 'float32'),  # neither holds the other
        ('float8_e4m3fn', 'float8_e5m2', 'bfloat16'),
    ],
)
def test_a_model_of_several_dtypes_is_computed_in_the_widest(embedding, norm, expected):
    def table(dtype):
        return jax.ShapeDtypeStruct((2, 2), jnp.dtype(dtype))

    adapted = LoraKernel(table('float8_e5m2'), table('float32'), table('float32'), 1.0)
    params = {'embed': {'embedding': table(embedding)}, 'layers': [adapted], 'final_norm': {'scale': table(norm)}}
    assert jpt.Model(None, params).compute.dtype == expected


@pytest.mark.parametrize('stored', [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16])
def test_weights_of_any_stored_dtype_are_computed_with_and_cast_on_request(stored, tmp_path):
    tensors = {
        name: values.astype(stored) for name, values in load_file(MODELS / 'llama' / 'model.safetensors').items()
    }
    save_file(tensors, tmp_path / 'model.safetensors')
    shutil.copy(MODELS / 'llama' / 'config.json', tmp_path)
    model = jpt.load(tmp_path)
    assert model.compute.dtype == ('float16' if stored is np.float16 else 'bfloat16')
    wide = jpt.load(tmp_path, dtype='float32')
    assert wide.compute.dtype == 'float32'
    for kept, cast in zip(*(to_hf(m.config, m.params).items() for m in (model, wide)), strict=True):
        assert kept[1].dtype == stored
        np.testing.assert_array_equal(kept[1], tensors[kept[0]])
        np.testing.assert_array_equal(cast[1], tensors[cast[0]].astype(np.float32))
