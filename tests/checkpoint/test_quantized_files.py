"""Quantized weights saved, read back, exported, imported and taken back to numbers: bit by bit at every step."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from quantized_models import BLOCKS, EXPERTS, GOLDEN, LLAMA, assert_same, quantized_model

import jpt
from jpt.checkpoint.dequantized import DequantizedSource
from jpt.checkpoint.fingerprint import fingerprint_of
from jpt.checkpoint.model_dir import StoredSource
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.safetensors import SafetensorsFile
from jpt.checkpoint.source import TreeSource, leaves_of
from jpt.convert import convert
from jpt.models.names import get, leaves
from jpt.quant.dot import dense
from jpt.quant.formats import FORMATS, Format
from jpt.quant.tensors import QTensor


@pytest.mark.parametrize('name', [*FORMATS, 'experts'])
def test_saved_and_loaded(name, tmp_path):
    fields, form = (EXPERTS, FORMATS['nvfp4']) if name == 'experts' else (LLAMA, FORMATS[name])
    _, model = quantized_model(fields, form)
    model.save(tmp_path / 'saved')
    assert_same(jpt.load(tmp_path / 'saved').params, model.params)
    numbers = jax.tree.map(dense, model.params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    assert_same(jpt.load(tmp_path / 'saved', dtype='bfloat16').params, numbers)
    convert(tmp_path / 'saved', tmp_path / 'copied', 'jpt')  # a stream of blocks, not a tree
    assert_same(jpt.load(tmp_path / 'copied').params, model.params)
    assert fingerprint_of(open_model(tmp_path / 'copied').source) == fingerprint_of(
        open_model(tmp_path / 'saved').source
    )


@pytest.mark.parametrize('scale', ['float32', 'power_of_two', 'e8m0'])
def test_exported_and_imported_in_blocks(scale, tmp_path):
    """The layout of transformers' FineGrainedFP8: names, shapes, dtypes, values, and what config.json says."""
    _, model = quantized_model(EXPERTS, dataclasses.replace(BLOCKS, scale=scale), 'layers/**')
    model.export(tmp_path / 'hf')
    assert_same(jpt.load(tmp_path / 'hf').params, model.params)
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())['quantization_config']
    assert config == {
        'quant_method': 'fp8',
        'fmt': 'e4m3',
        'activation_scheme': 'dynamic',
        'weight_block_size': [16, 16],
        'scale_fmt': 'float' if scale == 'float32' else 'ue8m0',
        'modules_to_not_convert': ['lm_head', 'model.layers.0.mlp.gate', 'model.layers.1.mlp.gate'],
    }
    file = SafetensorsFile(tmp_path / 'hf' / 'model.safetensors')
    experts = model.params['layers'][0][0]['mlp']['experts']['down']['kernel']
    for layer, expert in ((0, 3), (1, 0)):
        name = f'model.layers.{layer}.mlp.experts.{expert}.down_proj.weight'
        codes, scales = file.view(name), file.view(f'{name}_scale_inv')
        assert codes.dtype == ml_dtypes.float8_e4m3fn
        assert scales.shape == (3, 2)
        assert scales.dtype == (ml_dtypes.float8_e8m0fnu if scale == 'e8m0' else np.float32)
        np.testing.assert_array_equal(codes.view(np.uint8), np.asarray(experts.codes)[layer, expert].view(np.uint8))
        np.testing.assert_array_equal(scales.view(np.uint8), np.asarray(experts.scale)[layer, expert].view(np.uint8))
    assert file.view('model.layers.0.mlp.gate.weight').dtype == ml_dtypes.bfloat16


def test_a_part_of_a_weight_is_dequantized_alone():
    odd = Format('int4', 0, 1), Format('int4', 3, 5), FORMATS['nvfp4'], BLOCKS
    for name, form in (*(('llama', form) for form in odd), ('experts', FORMATS['fp8_tensor'])):
        _, model = quantized_model(EXPERTS if name == 'experts' else LLAMA, form)
        source = DequantizedSource(TreeSource(model.config, model.params), 'float32')
        random = np.random.default_rng(0)
        for leaf in leaves(model.config):
            weight = get(model.params, leaf.path)
            if isinstance(weight, QTensor):  # not through bfloat16, which would round twice
                weight = dataclasses.replace(weight, weight_dtype='float32')
            whole = np.asarray(dense(weight)).astype(np.float32)
            for _ in range(3):
                ends = [sorted(random.integers(0, size + 1, 2)) for size in leaf.shape]
                index = tuple(slice(int(a), int(max(b, a + 1))) for a, b in ends)
                index = tuple(
                    slice(min(part.start, size - 1), part.stop) for part, size in zip(index, leaf.shape, strict=True)
                )
                np.testing.assert_array_equal(source.read(leaf, index), whole[index])


@pytest.mark.parametrize('name', ['transformers_fp8', 'transformers_fp8_moe'])
def test_directories_that_transformers_wrote(name):
    """Logits of the dequantized weights, and with bfloat16 as with codes, but for the rounding of inputs."""
    golden = np.load(GOLDEN / name / 'golden.npz')
    model = jpt.load(GOLDEN / name, dtype='float32')
    np.testing.assert_allclose(model.logits(golden['tokens']), golden['logits'], atol=2e-5)
    codes = jpt.load(GOLDEN / name)
    kernel = codes.params['layers'][0][0]['attn']['q']['kernel']
    assert isinstance(kernel, QTensor)
    assert kernel.format == FORMATS['fp8_block']
    found, wanted = np.asarray(codes.logits(golden['tokens'])), golden['logits']
    assert np.linalg.norm(found - wanted) < 0.06 * np.linalg.norm(wanted)


def exported(tmp_path):
    _, model = quantized_model(LLAMA, BLOCKS)
    model.export(tmp_path / 'hf')
    return tmp_path / 'hf'


def changed_config(directory, **fields):
    path = directory / 'config.json'
    config = json.loads(path.read_text())
    config['quantization_config'] |= fields
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'activation_scheme': 'static'}, "activation_scheme='static': expected 'dynamic'"),
        ({'weight_block_size': [16]}, r'weight_block_size=\[16\]'),
        ({'weight_block_size': [8, 16]}, r'weight_scale_inv: has shape'),
        ({'fmt': 'e5m2'}, "fmt='e5m2'"),
        ({'expert_dtype': 'fp4'}, "expert_dtype='fp4'"),
        ({'rotation': 'hadamard'}, 'rotation'),
    ],
)
def test_configs_that_say_otherwise_are_refused(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        jpt.load(changed_config(exported(tmp_path), **fields))


def test_a_missing_or_extra_part_is_named(tmp_path):
    _, model = quantized_model(LLAMA, FORMATS['fp8_tensor'])
    model.save(tmp_path / 'saved')
    about = tmp_path / 'saved' / 'model' / 'model.json'
    content = json.loads(about.read_text())
    name = 'params/layers/0.0/attn/q/kernel/scale'
    for change, words in (
        (lambda c: c['leaves'].pop(name), 'attn/q/kernel/scale: not in the checkpoint'),
        (lambda c: c['leaves'].update({name + '_2': ['float32', [2, 1, 1]]}), 'attn/q/kernel/scale_2: float32'),
        (
            lambda c: c['statics'].pop('params/layers/0.0/attn/q/kernel/format'),
            'attn/q/kernel has codes, but no format',
        ),
    ):
        shutil.copytree(tmp_path / 'saved', tmp_path / 'changed', dirs_exist_ok=True)
        damaged = json.loads(json.dumps(content))
        change(damaged)
        (tmp_path / 'changed' / 'model' / 'model.json').write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=words):
            StoredSource(tmp_path / 'changed', check_files=False)


def test_what_needs_weights_as_they_were_says_so(tmp_path):
    _, model = quantized_model(LLAMA, BLOCKS)
    model.save(tmp_path / 'saved')
    with pytest.raises(ValueError, match=r'layers=\(0,\): the weights are quantized; ask for a dtype'):
        convert(tmp_path / 'saved', tmp_path / 'cut', 'jpt', layers=[0])
    convert(tmp_path / 'saved', tmp_path / 'cut', 'jpt', layers=[0], dtype='float32')
    assert jpt.load(tmp_path / 'cut').config.num_layers == 1
    assert {leaf.part for leaf in leaves_of(open_model(tmp_path / 'saved').source)} == {None, 'codes', 'scale'}
