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
from jpt.sharding.mesh import MeshConfig, make_mesh

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


def test_a_vocabulary_that_a_mesh_does_not_divide_is_padded_and_no_one_sees_it(tmp_path):
    """101 rows over four shards of the vocabulary: logits, greedy text, files are those of one device."""
    path = MODELS / 'olmo2'
    plain, golden = jpt.load(path), np.load(path / 'golden.npz')
    model = jpt.load(path, mesh=make_mesh(MeshConfig(data=2, pipe=2, tensor=2)))
    vocab = plain.config.vocab_size
    assert model.params['embed']['embedding'].shape[0] > vocab == plain.params['embed']['embedding'].shape[0]
    assert model.params['layers'][0][0]['mlp']['up']['kernel'].sharding.spec[0] == 'pipe'
    logits = model.logits(golden['tokens'])
    assert logits.shape[-1] == vocab
    np.testing.assert_allclose(logits, golden['logits'], atol=1e-4)
    results = model.generate([golden['prompt_0'].tolist()] * 4, max_new_tokens=6, temperature=0.0)
    assert {tuple(result.token_ids) for result in results} == {tuple(golden['greedy_0'][:6].tolist())}
    model.export(tmp_path / 'hf')
    model.save(tmp_path / 'jpt')
    for directory in ('hf', 'jpt'):
        jax.tree.map(np.testing.assert_array_equal, jpt.load(tmp_path / directory).params, plain.params)
