"""Scales of keys and values in files: what is there comes back, what is not there is 1, what does not fit is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from quantized_models import EXPERTS, GOLDEN, LLAMA, assert_same, changed, files_of, quantized_model, whole_model

import jpt
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.safetensors_writer import save_file
from jpt.checkpoint.selected import SelectedLayers
from jpt.checkpoint.sliced import Kept, SlicedSource
from jpt.checkpoint.source import load_tree
from jpt.checkpoint.tree import named_leaves
from jpt.convert import convert
from jpt.models.families import config_from_hf
from jpt.models.names import leaves
from jpt.quant.formats import FORMATS

K, V = 'model.layers.0.self_attn.k_proj.k_scale', 'model.layers.0.self_attn.v_proj.v_scale'
# One matrix makes queries, keys and values.
GPT2 = {'model_type': 'gpt2', 'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'vocab_size': 37, 'n_positions': 32}
# A latent is kept in their place.
LATENT = {
    'model_type': 'deepseek_v3', 'vocab_size': 37, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
    'moe_intermediate_size': 8, 'first_k_dense_replace': 2, 'num_attention_heads': 2, 'num_key_value_heads': 2,
    'n_routed_experts': 4, 'num_experts_per_tok': 2, 'n_group': 2, 'topk_group': 1, 'n_shared_experts': 1,
    'q_lora_rank': 12, 'kv_lora_rank': 10, 'qk_nope_head_dim': 6, 'qk_rope_head_dim': 4, 'v_head_dim': 8,
    'max_position_embeddings': 64, 'tie_word_embeddings': False,
}  # fmt: skip


def with_scales(model):
    """The model with a cache of codes and a scale of its own for everything that has one, no two of them alike."""
    drawn = np.random.default_rng(0)

    def layer(params):
        names = ['k_scale'] if 'kv_down' in params['attn'] else ['k_scale', 'v_scale']
        repeats = params['attn']['out']['kernel'].shape[0]
        scales = {name: drawn.uniform(0.01, 0.1, repeats).astype(np.float32) for name in names}
        return params | {'attn': params['attn'] | jax.device_put(scales)}

    layers = [[layer(kind) for kind in kinds] for kinds in model.params['layers']]
    cfg = dataclasses.replace(model.config, kv_cache='fp8')
    return dataclasses.replace(model, config=cfg, params=model.params | {'layers': layers})


MODELS = {
    'fp8_tensor': lambda: quantized_model(LLAMA, FORMATS['fp8_tensor'])[1],
    'experts': lambda: quantized_model(EXPERTS, FORMATS['fp8_channel_token'])[1],
    'whole': lambda: whole_model(LLAMA),
    'gpt2': lambda: whole_model(GPT2),
    'latent': lambda: whole_model(LATENT),
}


@pytest.mark.parametrize('name', MODELS)
def test_scales_come_back_from_every_layout_and_checkpoint(name, tmp_path):
    """Saved, exported as both layouts from that, read again: bit for bit; a cast of the weights leaves them alone."""
    model = with_scales(MODELS[name]())
    model.save(tmp_path / 'jpt')
    assert_same(jpt.load(tmp_path / 'jpt').params, model.params)
    for layout in ('modelopt', 'compressed-tensors'):
        convert(tmp_path / 'jpt', tmp_path / layout, 'hf', layout=layout)
        again = jpt.load(tmp_path / layout)
        assert again.config == model.config
        assert_same(again.params, model.params)
        convert(tmp_path / layout, tmp_path / f'{layout} again', 'jpt')
        assert_same(jpt.load(tmp_path / f'{layout} again').params, model.params)
    with pytest.raises(ValueError, match="layout 'fp8': has no place for scales of keys and values"):
        model.export(tmp_path / 'fp8', layout='fp8')
    wide = jpt.load(tmp_path / 'modelopt', dtype='float32')
    assert wide.config.kv_cache == 'fp8'
    ends = 'attn/k_scale', 'attn/v_scale'
    wanted = {path: leaf for path, leaf in named_leaves(model.params).items() if path.endswith(ends)}
    assert wanted
    for path, leaf in wanted.items():
        assert named_leaves(wide.params)[path].dtype == 'float32'
        np.testing.assert_array_equal(named_leaves(wide.params)[path], leaf)


def test_names_shapes_and_dtypes_are_those_that_the_libraries_write(tmp_path):
    """Those of the golden files; and where the weights' dtype holds a scale, and where it does not."""
    model = with_scales(whole_model(LLAMA))
    scales = model.params['layers'][0][0]['attn']
    scales['k_scale'] = scales['k_scale'].at[:].set(0.015625)
    scales['v_scale'] = scales['v_scale'].at[:].set(0.1)
    model.export(tmp_path / 'm', layout='modelopt')
    found = files_of(tmp_path / 'm')
    assert [(found[name].dtype, found[name].shape) for name in (K, V)] == [(np.float32, ())] * 2
    model.export(tmp_path / 'c', layout='compressed-tensors')
    found = files_of(tmp_path / 'c')
    one, other = (found[f'model.layers.1.self_attn.{name}'] for name in ('k_scale', 'v_scale'))
    assert (str(one.dtype), str(other.dtype), one.shape, other.shape) == ('bfloat16', 'float32', (1,), (1,))


def test_scales_of_1_are_as_modelopt_has_them(tmp_path):
    """ModelOpt's cast writes no tensor; compressed-tensors' reader would miss them."""
    model = jpt.load(GOLDEN / 'modelopt_kv_cast')
    for name in ('k_scale', 'v_scale'):
        np.testing.assert_array_equal(model.params['layers'][0][0]['attn'][name], np.ones(2, np.float32))
    model.export(tmp_path / 'c', layout='compressed-tensors')
    assert files_of(tmp_path / 'c')['model.layers.1.self_attn.v_scale'] == np.ones(1)
    convert(tmp_path / 'c', tmp_path / 'm', 'hf', layout='modelopt')
    assert not any('_scale' in name for name in files_of(tmp_path / 'm'))
    said = json.loads((tmp_path / 'm' / 'hf_quant_config.json').read_text())['quantization']
    assert said == {'quant_algo': None, 'kv_cache_quant_algo': 'FP8', 'quantized_layers': {}}
    model.export(tmp_path / 'default')
    said = json.loads((tmp_path / 'default' / 'config.json').read_text())['quantization_config']
    assert said['quant_method'] == 'compressed-tensors'
    assert said['config_groups'] == {}
    assert jpt.load(tmp_path / 'm').config.kv_cache == 'fp8'


def test_layers_of_a_hybrid_have_scales_where_they_attend():
    config = json.loads((GOLDEN.parent / 'models' / 'nemotron_h' / 'config.json').read_text())
    cfg = dataclasses.replace(config_from_hf(config), kv_cache='fp8')
    attends = [at for at, kind in enumerate(cfg.layer_kinds()) if kind.mixer == 'attention']
    found = {source.name for leaf in leaves(cfg) for source in leaf.sources if source.name.endswith('.k_scale')}
    assert found == {f'backbone.layers.{layer}.mixer.k_scale' for layer in attends}
    assert 0 < len(attends) < cfg.num_layers


def test_a_smaller_model_has_the_scales_of_what_stays(tmp_path):
    model = with_scales(whole_model(LLAMA | {'num_key_value_heads': 2}))
    model.save(tmp_path / 'whole')
    convert(tmp_path / 'whole', tmp_path / 'last', 'hf', layers=(1,))
    scales = model.params['layers'][0][0]['attn']
    found = jpt.load(tmp_path / 'last').params['layers'][0][0]['attn']
    source = open_model(tmp_path / 'whole').source
    sliced = SlicedSource(SelectedLayers(source, (0, 1)), Kept(heads=((1,), (0,)), kv_heads=((1,), (0,))))
    for name in ('k_scale', 'v_scale'):
        np.testing.assert_array_equal(found[name], scales[name][1:])
        np.testing.assert_array_equal(load_tree(sliced)['layers'][0][0]['attn'][name], scales[name])


def test_without_them_on_request(tmp_path):
    for name in ('modelopt_fp8_kv', 'compressed_fp8_kv', 'modelopt_kv_cast'):
        model = jpt.load(GOLDEN / name, ignore_kv_scales=True)
        assert model.config.kv_cache == 'as_computed'
        assert 'k_scale' not in model.params['layers'][0][0]['attn']
    convert(GOLDEN / 'modelopt_fp8_kv', tmp_path / 'out', 'hf', ignore_kv_scales=True)
    assert not any('k_scale' in name for name in files_of(tmp_path / 'out'))
    said = json.loads((tmp_path / 'out' / 'hf_quant_config.json').read_text())['quantization']
    assert said['kv_cache_quant_algo'] is None
    convert(GOLDEN / 'modelopt_fp8_kv', tmp_path / 'jpt', 'jpt')
    assert open_model(tmp_path / 'jpt').source.cfg.kv_cache == 'fp8'
    assert open_model(tmp_path / 'jpt', ignore_kv_scales=True).source.cfg.kv_cache == 'as_computed'


@pytest.mark.parametrize(
    ('name', 'tensors', 'config', 'words'),
    [
        ('modelopt_fp8_kv', lambda f: f.pop(V), None, f'{V}: missing'),
        ('modelopt_fp8_kv', lambda f: f.update({K: np.ones(2, np.float32)}), None, f'{K}.*2.*expected'),
        ('modelopt_fp8_kv', lambda f: f.update({K: np.ones((), np.int8)}), None, f'{K}: is int8, expected one of F32'),
        ('modelopt_fp8_kv', None, {'kv_cache_scheme': {'num_bits': 4}}, '_scheme=.*4}: expected .*8.* or null; the'),
        ('modelopt_fp8_kv', lambda f: f.update({K: np.zeros((), 'f')}), None, f'{K} is 0.0: expected a positive'),
        ('modelopt_fp8_kv', lambda f: f.update({V: np.float32('nan').reshape(())}), None, f'{V} is nan: expected a'),
        ('modelopt_fp8_kv', None, {'kv_cache_scheme': None}, 'say different things'),
        ('modelopt_nvfp4', lambda f: f.update({K: np.ones((), np.float32)}), None, f'{K}: unexpected'),
        ('compressed_fp8_kv', None, {'strategy': 'attn_head'}, "scheme.strategy='attn_head': expected 'tensor'"),
        ('compressed_fp8_kv', None, {'dynamic': True}, 'kv_cache_scheme.dynamic=True: expected False'),
        ('compressed_fp8_kv', lambda f: f.pop('model.layers.0.self_attn.k_scale'), None, 'k_scale: missing'),
        ('compressed_fp8_dynamic', lambda f: f.update({'model.layers.0.self_attn.k_scale': np.ones(1, 'f')}), None,
         'self_attn.k_scale: unexpected'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(name, tensors, config, words, tmp_path):
    def change(said):
        (said['kv_cache_scheme'] if name.startswith('compressed') else said).update(config or {})

    directory = changed(name, tmp_path, tensors or (lambda files: None), change if config else lambda said: None)
    with pytest.raises(ValueError, match=words):
        open_model(directory)


def test_what_is_not_read_can_be_left_out(tmp_path):
    """A cache in four bits; scales of the keys and values that are made from latents, as of any attention."""

    def in_four_bits(said):
        said['kv_cache_scheme' if 'kv_cache_scheme' in said else 'kv_cache_quant_algo'] = 'NVFP4'

    directory = changed('modelopt_fp8_kv', tmp_path, config=in_four_bits, beside=in_four_bits)
    with pytest.raises(ValueError, match=r"quant_algo='NVFP4': expected 'FP8' or null; .*--ignore_kv_scales"):
        open_model(directory)
    assert open_model(directory, ignore_kv_scales=True).source.cfg.kv_cache == 'as_computed'
    model = with_scales(whole_model(LATENT))
    model.export(tmp_path / 'latent', layout='modelopt')
    files = files_of(tmp_path / 'latent')
    save_file(tmp_path / 'latent' / 'model.safetensors', files | {V: np.ones((), 'f')})
    with pytest.raises(ValueError, match=f'(?s)from latents.*--ignore_kv_scales:.*{V}'):
        open_model(tmp_path / 'latent')
    assert open_model(tmp_path / 'latent', ignore_kv_scales=True).source.cfg.kv_cache == 'as_computed'


def test_a_model_without_a_cache_is_refused():
    encoder = {
        'model_type': 'bert', 'hidden_size': 16, 'num_attention_heads': 2, 'num_hidden_layers': 1, 'vocab_size': 37,
        'intermediate_size': 16, 'max_position_embeddings': 16, 'type_vocab_size': 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="kv_cache='fp8': bert keeps no keys and values: expected 'as_computed'"):
        dataclasses.replace(whole_model(encoder).config, kv_cache='fp8')
    with pytest.raises(ValueError, match="kv_cache='int4': expected 'as_computed' or 'fp8'"):
        dataclasses.replace(whole_model(LLAMA).config, kv_cache='int4')
