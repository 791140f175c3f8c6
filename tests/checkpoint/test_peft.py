"""Adapters of PEFT: its golden files read, and what is written read again. Made by tests/golden/make_peft.py."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jpt.checkpoint.peft import read_adapter, write_adapter
from jpt.checkpoint.safetensors import load_file
from jpt.checkpoint.safetensors_writer import save_file
from jpt.models.families import config_from_hf
from jpt.models.names import from_hf, to_hf
from jpt.models.transformer import forward, unembed
from jpt.quant.dot import LoraKernel
from jpt.quant.lora import add_lora, merge_lora

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
NAMES = ('llama', 'gpt2')


@functools.cache
def _base(name: str):
    directory = GOLDEN / 'models' / name
    cfg = config_from_hf(json.loads((directory / 'config.json').read_text()))
    return cfg, from_hf(cfg, load_file(directory / 'model.safetensors'))


@pytest.mark.parametrize('name', NAMES)
def test_logits_with_an_adapter_are_those_of_peft(name):
    cfg, base = _base(name)
    golden = np.load(GOLDEN / 'peft' / name / 'golden.npz')
    params = read_adapter(GOLDEN / 'peft' / name, cfg, base)

    @jax.jit
    def logits(params, tokens):
        with jax.default_matmul_precision('highest'):
            return unembed(cfg, params, forward(cfg, params, tokens).hidden_BTD)

    np.testing.assert_allclose(logits(params, golden['tokens']), golden['logits'], atol=1e-4)
    without = np.load(GOLDEN / 'models' / name / 'golden.npz')['logits']
    assert np.abs(without - golden['logits']).max() > 0.1


@pytest.mark.parametrize('name', NAMES)
def test_merged_weights_are_those_of_peft(name):
    cfg, base = _base(name)
    golden = np.load(GOLDEN / 'peft' / name / 'golden.npz')
    merged = to_hf(cfg, merge_lora(read_adapter(GOLDEN / 'peft' / name, cfg, base)))
    plain = to_hf(cfg, base)
    adapted = {key.removeprefix('merged/') for key in golden.files if key.startswith('merged/')}
    for weight in merged:
        expected = golden[f'merged/{weight}'] if weight in adapted else plain[weight]
        np.testing.assert_allclose(merged[weight], expected, rtol=1e-6, atol=1e-6, err_msg=weight)
    assert len(adapted) == {'llama': 6, 'gpt2': 4}[name]


def test_layers_differ_in_rank_and_scale_and_one_has_none():
    cfg, base = _base('llama')
    query = read_adapter(GOLDEN / 'peft' / 'llama', cfg, base)['layers'][0][0]['attn']['q']['kernel']
    stored = load_file(GOLDEN / 'peft' / 'llama' / 'adapter_model.safetensors')
    assert query.a.shape == (3, 4, 36)
    assert query.scale == 12 / 2  # alpha / sqrt(rank) of layer 0
    np.testing.assert_array_equal(query.a[0], stored['base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'])
    assert not np.asarray(query.a[1, 3:]).any()
    ratio = 6 / np.sqrt(3) / 6
    layer_1 = stored['base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight']
    np.testing.assert_allclose(query.b[1, :, :3], ratio * layer_1, rtol=1e-6)
    assert not np.asarray(query.a[2]).any()
    assert not np.asarray(query.b[2]).any()


@pytest.mark.parametrize('name', NAMES)
def test_writing_and_reading_give_the_same_adapter(name, tmp_path):
    cfg, base = _base(name)
    params = read_adapter(GOLDEN / 'peft' / name, cfg, base)
    write_adapter(tmp_path, cfg, params, base_model='base')
    theirs, ours = (load_file(path / 'adapter_model.safetensors') for path in (GOLDEN / 'peft' / name, tmp_path))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    again = merge_lora(read_adapter(tmp_path, cfg, base))
    expected = merge_lora(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), again, expected)
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert config['peft_type'] == 'LORA'
    assert config['base_model_name_or_path'] == 'base'
    assert config['fan_in_fan_out'] is (name == 'gpt2')


def test_written_targets_are_short_where_all_layers_are_adapted(tmp_path):
    cfg, base = _base('llama')
    params = add_lora(base, jax.random.key(0), ['layers/*/attn/{q,k}'], rank=2, alpha=3.0, ranks={'**/k': 1})
    write_adapter(tmp_path, cfg, params)
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    assert config['target_modules'] == ['k_proj', 'q_proj']
    assert (config['r'], config['lora_alpha']) == (2, 3.0)
    assert sorted(config['rank_pattern'].values()) == [1, 1, 1]
    assert config['alpha_pattern'] == {}


def test_separate_factors_of_a_fused_module_become_one_block_matrix(tmp_path):
    cfg, base = _base('gpt2')
    rng = np.random.default_rng(0)
    params = add_lora(base, jax.random.key(0), ['layers/*/attn/{q,v}'], rank=2, alpha=3.0, alphas={'**/v': 5.0})
    for name in ('q', 'v'):
        kernel = params['layers'][0][0]['attn'][name]['kernel']
        b = rng.normal(size=kernel.b.shape).astype(np.float32)
        params['layers'][0][0]['attn'][name]['kernel'] = LoraKernel(kernel.base, kernel.a, b, kernel.scale)
    write_adapter(tmp_path, cfg, params)
    again = merge_lora(read_adapter(tmp_path, cfg, base))
    expected = merge_lora(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), again, expected)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('peft_type', 'IA3', "peft_type='IA3': expected 'LORA'"),
        ('use_dora', True, 'use_dora=True is not supported'),
        ('modules_to_save', ['lm_head'], r"modules_to_save=\['lm_head'\] is not supported"),
        ('bias', 'all', "bias='all': expected 'none'"),
        ('init_lora_weights', 'pissa', "init_lora_weights='pissa' changes the base weights"),
        ('r', 5, 'adapter_config.json says rank 5'),
        ('a_field_of_the_future', 3, 'a_field_of_the_future=3 is not supported'),
    ],
)
def test_config_fields_that_change_the_computation_are_refused(field, value, message, tmp_path):
    cfg, base = _base('llama')
    shutil.copytree(GOLDEN / 'peft' / 'llama', tmp_path / 'adapter')
    path = tmp_path / 'adapter' / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / 'adapter', cfg, base)


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('layers.0.mlp.down_proj.lora_B', None, r'down_proj\.lora_A\.weight is there, .*lora_B\.weight is missing'),
        (
            'embed_tokens.lora_embedding_A',
            (4, 36),
            'that belong to no linear layer of the model: .*embedding_A',
        ),
        ('layers.0.mlp.down_proj.lora_A', (4, 51), r'lora_A \(4, 51\), .* expected \(rank, 52\)'),
    ],
)
def test_tensors_must_fit(name, shape, message, tmp_path):
    cfg, base = _base('llama')
    shutil.copytree(GOLDEN / 'peft' / 'llama', tmp_path / 'adapter')
    path = tmp_path / 'adapter' / 'adapter_model.safetensors'
    tensors = load_file(path)
    full = f'base_model.model.model.{name}.weight'
    tensors.pop(full, None)
    if shape is not None:
        tensors[full] = np.zeros(shape, np.float32)
    save_file(path, tensors)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / 'adapter', cfg, base)


def test_a_model_without_adapter_is_not_written(tmp_path):
    cfg, base = _base('llama')
    with pytest.raises(ValueError, match='the model has no adapter to write'):
        write_adapter(tmp_path / 'adapter', cfg, base)
    assert not (tmp_path / 'adapter').exists()
