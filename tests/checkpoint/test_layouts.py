"""Quantized weights in the layouts of ModelOpt, compressed-tensors and transformers: read, written, and back."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantized_models import EXPERTS, GOLDEN, Frozen, assert_same, changed, files_of, whole_model

import jpt
from jpt.checkpoint.hf_import import HuggingFaceSource
from jpt.checkpoint.source import leaves_of, whole
from jpt.convert import convert
from jpt.models.config import Compute
from jpt.models.transformer import forward, unembed
from jpt.quant.formats import FORMATS, Format
from jpt.quant.recipes import chosen, quantized_tree, recipe_of
from jpt.quant.tensors import QTensor, quantize

LAYOUT_OF = {
    'modelopt_fp8_kv': 'modelopt',
    'modelopt_kv_cast': 'modelopt',
    'modelopt_nvfp4': 'modelopt',
    'modelopt_fp8_block': 'modelopt',
    'modelopt_int4_awq': 'modelopt',
    'modelopt_w4a8_awq': 'modelopt',
    'compressed_fp8_dynamic': 'compressed-tensors',
    'compressed_fp8_block': 'compressed-tensors',
    'compressed_w4a16': 'compressed-tensors',
    'compressed_nvfp4a16': 'compressed-tensors',
    'compressed_fp8_kv': 'compressed-tensors',
    'transformers_fp8': 'fp8',
    'transformers_fp8_moe': 'fp8',
}
COMPUTE = Compute(dtype='float32')
# Sides that groups of 128 divide, one of which blocks of 128 do not.
WIDE = {
    'model_type': 'llama', 'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2, 'vocab_size': 37,
    'num_attention_heads': 4, 'num_key_value_heads': 1, 'head_dim': 32, 'max_position_embeddings': 64,
    'rms_norm_eps': 1e-6, 'rope_theta': 1e4, 'tie_word_embeddings': False,
}  # fmt: skip


def settings_of(directory):
    """What both configs say of quantization, but for who wrote them and what observed the weights."""
    config = json.loads((directory / 'config.json').read_text())['quantization_config']
    other = directory / 'hf_quant_config.json'
    beside = json.loads(other.read_text()) if other.is_file() else {}
    for each in (config, beside):
        each.pop('producer', None)
    for group in config.get('config_groups', {}).values():
        for part in ('weights', 'input_activations'):
            (group.get(part) or {}).pop('observer', None)
    return config, beside


@pytest.mark.parametrize('name', LAYOUT_OF)
def test_a_directory_of_another_library_comes_back_byte_for_byte(name, tmp_path):
    """Tensors: names, dtypes, shapes, bytes. Configs: all fields. Read in blocks of leaves, not as a tree."""
    convert(GOLDEN / name, tmp_path / 'out', 'hf', layout=LAYOUT_OF[name])
    wanted, found = files_of(GOLDEN / name), files_of(tmp_path / 'out')
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key
    (config, beside), (said, said_beside) = settings_of(GOLDEN / name), settings_of(tmp_path / 'out')
    if LAYOUT_OF[name] == 'fp8':  # transformers' list has ends of names, and fields of its own
        assert said.pop('fmt') == 'e4m3'
        assert {'lm_head', 'model.layers.0.self_attn.k_proj'} < set(said.pop('modules_to_not_convert'))
        config = {key: config[key] for key in said}
    assert (said, said_beside) == (config, beside)


@pytest.mark.parametrize('name', LAYOUT_OF)
def test_the_numbers_are_those_of_the_library(name):
    golden = np.load(GOLDEN / name / 'golden.npz')
    model = jpt.load(GOLDEN / name, dtype='float32', ignore_kv_scales=True)
    np.testing.assert_allclose(model.logits(golden['tokens']), golden['logits'], atol=2e-5)
    codes = jpt.load(GOLDEN / name).params['layers'][0][0]['attn']['q']['kernel']
    assert isinstance(codes, QTensor) == (name != 'modelopt_kv_cast')
    assert getattr(codes, 'weight_dtype', codes.dtype) == 'bfloat16'


def logits_in_float32(model, tokens):
    def run(params, tokens):
        return unembed(model.config, params, forward(model.config, params, tokens, compute=COMPUTE).hidden_BTD)

    return np.asarray(jax.jit(run)(model.params, jnp.asarray(tokens)))


@pytest.mark.parametrize(
    'name',
    ['compressed_fp8_dynamic', 'compressed_fp8_block', 'compressed_fp8_kv', 'modelopt_fp8_kv', 'modelopt_kv_cast'],
)
def test_rounded_inputs_and_caches_are_those_of_the_library(name):
    """The library's own quantizers round inputs, keys and values by the same rule, so that nothing but float32's order
    differs."""
    golden = np.load(GOLDEN / name / 'golden.npz')
    found = logits_in_float32(jpt.load(GOLDEN / name), golden['tokens'])
    np.testing.assert_allclose(found, golden['logits_activations'], atol=2e-5)
    assert np.abs(golden['logits_activations'] - golden['logits']).max() > 0.1  # rounding does something


@pytest.mark.parametrize('name', LAYOUT_OF)
def test_a_piece_of_a_part_is_that_piece_of_the_whole(name):
    source, random = HuggingFaceSource(GOLDEN / name), np.random.default_rng(0)
    for leaf in leaves_of(source):
        if leaf.part is None or not leaf.shape:
            continue
        full = source.read(leaf, whole(leaf))
        assert full.dtype == source.dtype(leaf)
        for _ in range(4):
            ends = [sorted(random.choice(size + 1, 2, replace=False)) for size in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(
                source.read(leaf, index).view(np.uint8), np.ascontiguousarray(full[index]).view(np.uint8)
            )


# The layouts that hold a format, the first of which an export takes; input_scale where a layout needs it.
HOLD = {
    'fp8_tensor': ['modelopt', 'compressed-tensors'],
    'fp8_channel_token': ['modelopt', 'compressed-tensors'],
    'fp8_block': ['fp8', 'compressed-tensors'],
    'fp8_block_ue8m0': ['fp8'],
    'fp8_weights': ['compressed-tensors'],
    'fp8_block_weights': ['modelopt', 'compressed-tensors'],
    'mxfp8': ['modelopt', 'fp8', 'compressed-tensors'],
    'nvfp4': ['modelopt', 'compressed-tensors'],
    'nvfp4_weights': ['modelopt', 'compressed-tensors'],
    'int8': ['compressed-tensors'],
    'int8_tensor': ['modelopt', 'compressed-tensors'],
    'int8_weights': ['modelopt', 'compressed-tensors'],
    'int4_weights': ['modelopt', 'compressed-tensors'],
    'w4a8': ['modelopt'],
    'mxfp4_weights': ['compressed-tensors'],
}
METHODS = ('fp8', 'modelopt', 'compressed-tensors')


def model_in(fields, choices, scaled=True):
    """A model quantized by a recipe, with scales of inputs where a layout asks for them."""
    model = whole_model(fields)

    def kernel(path, weight, form):
        static = form.inputs == 'tensor' or (form.scale == 'e4m3' and form.inputs == 'block' and scaled)
        scale = jnp.broadcast_to(jnp.float32(0.01) / 3, weight.shape[:-2]) if static else None
        return quantize(weight, form, input_scale=scale)

    formats = Frozen(chosen(model.params, recipe_of(choices)))
    return dataclasses.replace(
        model, params=jax.jit(quantized_tree, static_argnums=(1, 2))(model.params, formats, kernel)
    )


def assert_near(one, other):
    """Bit-equal but for numbers of which a file holds the reciprocal: those are equal or neighbours."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if path[-1] in map(jax.tree_util.GetAttrKey, ('scale_2', 'input_scale')):
            np.testing.assert_array_max_ulp(a, b, 1)
        else:
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


FORMS = FORMATS | {'mxfp4_weights': Format('e2m1', 1, 32, 'e8m0')}


def test_every_format_is_told_of():
    assert set(HOLD) == set(FORMS)


@pytest.mark.parametrize('name', HOLD)
def test_every_format_in_every_layout_that_holds_it(name, tmp_path):
    model = model_in(WIDE, [('layers/**', FORMS[name])])
    model.export(tmp_path / 'first')
    assert jpt.load(tmp_path / 'first').params['layers'][0][0]['attn']['q']['kernel'].format == FORMS[name]
    said = json.loads((tmp_path / 'first' / 'config.json').read_text())['quantization_config']
    assert said['quant_method'] == HOLD[name][0]
    for layout in METHODS:
        if layout in HOLD[name]:
            model.export(tmp_path / layout, layout=layout)
            same = assert_near if (layout, 'nvfp4' in name) == ('compressed-tensors', True) else assert_same
            same(jpt.load(tmp_path / layout).params, model.params)
        else:
            held = re.escape(', '.join(sorted(HOLD[name], key=METHODS.index)))
            with pytest.raises(ValueError, match=f"layout '{layout}': layers/.*\\n?.*layouts that hold it: {held}"):
                model.export(tmp_path / layout, layout=layout)
            assert not (tmp_path / layout).exists()


def test_a_scale_is_written_in_the_dtype_of_the_weight_only_where_that_holds_it(tmp_path):
    model = model_in(WIDE, 'fp8_channel_token')
    model.export(tmp_path / 'wide', layout='compressed-tensors')
    name = 'model.layers.0.mlp.up_proj.weight_scale'
    assert files_of(tmp_path / 'wide')[name].dtype == np.float32
    short = jax.tree.map(
        lambda leaf: (
            dataclasses.replace(leaf, scale=leaf.scale.astype('bfloat16').astype('float32'))
            if isinstance(leaf, QTensor)
            else leaf
        ),
        model.params,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    dataclasses.replace(model, params=short).export(tmp_path / 'short', layout='compressed-tensors')
    assert files_of(tmp_path / 'short')[name].dtype == ml_dtypes.bfloat16
    assert_same(jpt.load(tmp_path / 'short').params, short)


def test_several_formats(tmp_path):
    choices = [('layers/**/attn', 'fp8_tensor'), ('layers/**/mlp', 'nvfp4'), ('layers/**/attn/k', None)]
    model = model_in(WIDE, choices)
    model.export(tmp_path / 'modelopt')
    assert_same(jpt.load(tmp_path / 'modelopt').params, model.params)
    config, beside = settings_of(tmp_path / 'modelopt')
    layers = beside['quantization'].pop('quantized_layers')
    assert beside == {'quantization': {'quant_algo': 'MIXED_PRECISION', 'kv_cache_quant_algo': None}}
    assert set(layers) == {
        f'model.layers.{layer}.{name}'
        for layer in (0, 1)
        for name in (
            *(f'self_attn.{end}_proj' for end in 'qvo'),
            *(f'mlp.{end}_proj' for end in ('gate', 'up', 'down')),
        )
    }
    assert layers['model.layers.1.self_attn.o_proj'] == {'quant_algo': 'FP8'}
    assert layers['model.layers.0.mlp.up_proj'] == {'quant_algo': 'NVFP4', 'group_size': 16}
    assert config['quantized_layers'] == layers
    groups = {tuple(group['targets']): group for group in config['config_groups'].values()}
    assert sorted(name for names in groups for name in names) == sorted(layers)
    model.export(tmp_path / 'compressed', layout='compressed-tensors')
    assert_near(jpt.load(tmp_path / 'compressed').params, model.params)
    with pytest.raises(ValueError, match='layouts that hold it: modelopt, compressed-tensors'):
        model.export(tmp_path / 'fp8', layout='fp8')


def test_deepseek_in_blocks(tmp_path):
    """Blocks of FP8 in the model's layers, its low-rank projections and experts; its further layers as they were."""
    model = jpt.load(GOLDEN.parent / 'mtp' / 'deepseek_v3', dtype='bfloat16')
    formats = chosen(model.params, recipe_of([('layers/**', Format('e4m3', 16, 16, inputs='block'))]))
    params = quantized_tree(model.params, formats, lambda path, weight, form: quantize(weight, form))
    dataclasses.replace(model, params=params).export(tmp_path / 'out')
    assert_same(jpt.load(tmp_path / 'out').params, params)
    found = files_of(tmp_path / 'out')
    assert found['model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv'].dtype == np.float32
    assert 'model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv' not in found


def test_second_scales_that_servers_would_take_as_one(tmp_path, caplog):
    convert(GOLDEN / 'modelopt_nvfp4', tmp_path / 'shared', 'hf')
    assert not caplog.text
    model_in(WIDE, 'nvfp4_weights').export(tmp_path / 'apart')
    assert 'layers/0.0/attn: q, k, v' in caplog.text
    assert 'layers/0.0/mlp: gate, up' in caplog.text


def test_experts_lie_one_by_one(tmp_path):
    model = model_in(EXPERTS | {'hidden_size': 32, 'head_dim': 16, 'moe_intermediate_size': 16}, 'nvfp4')
    model.export(tmp_path / 'out')
    assert_same(jpt.load(tmp_path / 'out').params, model.params)
    down, found = model.params['layers'][0][0]['mlp']['experts']['down']['kernel'], files_of(tmp_path / 'out')
    stem = 'model.layers.1.mlp.experts.3.down_proj'
    np.testing.assert_array_equal(found[f'{stem}.weight'], np.asarray(down.codes)[1, 3])
    assert found[f'{stem}.weight_scale_2'].shape == found[f'{stem}.input_scale'].shape == ()
    assert found[f'{stem}.weight_scale_2'] == np.asarray(down.scale_2)[1, 3, 0, 0]
    excluded = json.loads((tmp_path / 'out' / 'hf_quant_config.json').read_text())['quantization']['exclude_modules']
    assert excluded == ['lm_head', 'model.embed_tokens', 'model.layers.0.mlp.gate', 'model.layers.1.mlp.gate']


@pytest.mark.parametrize(
    ('choices', 'fields', 'layout', 'words'),
    [
        ('nvfp4', {}, None, "layout 'modelopt': layers/.*NVFP4 needs an input_scale, known beforehand"),
        ('int4_weights', {'intermediate_size': 192}, 'modelopt', 'multiples of 128 inputs, not 192'),
        ('fp8_block', {'intermediate_size': 192}, 'compressed-tensors', 'multiples of 128 inputs, not 192'),
        ([('layers/**', Format('e4m3', 64, 64))], {}, 'modelopt', "layout 'modelopt': layers/.*has FP8, "),
        ('fp8_block', {}, 'gguf', "layout='gguf': expected one of fp8, modelopt, compressed-tensors"),
    ],
)
def test_what_a_layout_does_not_hold(choices, fields, layout, words, tmp_path):
    model = model_in(WIDE | fields, choices, scaled=False)
    with pytest.raises(ValueError, match=words):
        model.export(tmp_path / 'out', layout=layout)
    assert not (tmp_path / 'out').exists()


def test_a_layout_is_of_quantized_weights_in_a_hugging_face_directory(tmp_path):
    with pytest.raises(ValueError, match="layout='fp8': the weights are not quantized"):
        whole_model(WIDE).export(tmp_path / 'out', layout='fp8')
    with pytest.raises(ValueError, match='--layout=fp8 with --to=jpt: expected --to=hf'):
        convert(GOLDEN / 'transformers_fp8', tmp_path / 'out', 'jpt', layout='fp8')


def test_older_directories_say_it_in_one_file_alone(tmp_path):
    directory = shutil.copytree(GOLDEN / 'modelopt_int4_awq', tmp_path / 'older')
    config = json.loads((directory / 'config.json').read_text())
    del config['quantization_config']
    (directory / 'config.json').write_text(json.dumps(config))
    assert_same(jpt.load(directory).params, jpt.load(GOLDEN / 'modelopt_int4_awq').params)


UP, DOWN = 'model.layers.0.mlp.up_proj', 'model.layers.0.mlp.down_proj'


def half(files):
    """The first layer's weight as it was before."""
    for key in [key for key in files if key.startswith(f'{UP}.')]:
        del files[key]
    files[f'{UP}.weight'] = np.zeros((80, 48), ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ('name', 'tensors', 'words'),
    [
        ('modelopt_nvfp4', lambda f: f.pop(f'{UP}.weight_scale'), f'in part.*\n  {UP}.weight: has no scale'),
        ('modelopt_nvfp4', lambda f: f.pop(f'{UP}.weight_scale_2'), f'{UP}.weight_scale_2: missing'),
        ('modelopt_nvfp4', lambda f: f.pop(f'{DOWN}.input_scale'), f'{DOWN}.input_scale: missing'),
        (
            'modelopt_fp8_block',
            lambda f: f.update({f'{UP}.input_scale': np.float32(1).reshape(())}),
            f'{UP}.input_scale: unexpected',
        ),
        (
            'modelopt_fp8_block',
            lambda f: f.update({f'{UP}.weight_scale': f[f'{UP}.weight_scale'][:1]}),
            r'up_proj.weight_scale: has shape \[1, 1, 1, 1\], expected \[2, 1, 1, 1\]',
        ),
        (
            'modelopt_int4_awq',
            lambda f: f.update({f'{UP}.weight': f[f'{UP}.weight'].view(np.int8)}),
            f'{UP}.weight: is int8, expected one of U8',
        ),
        (
            'compressed_w4a16',
            lambda f: f.update({f'{UP}.weight_shape': np.array([256, 127])}),
            r'up_proj.weight_shape says \[256, 127\], expected \[256, 128\]',
        ),
        ('compressed_w4a16', lambda f: f.pop(f'{UP}.weight_scale'), f'{UP}.weight: has no scale'),
        ('compressed_nvfp4a16', lambda f: f.pop(f'{UP}.weight_global_scale'), f'{UP}.weight_global_scale: missing'),
        (
            'compressed_fp8_dynamic',
            lambda f: f.update({f'{UP}.weight_zero_point': np.zeros((80, 1), np.int8)}),
            f'{UP}.weight_zero_point: unexpected',
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_named(name, tensors, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        jpt.load(changed(name, tmp_path, tensors))


def test_a_layer_that_is_as_it_was_stands_in_a_stack_of_its_own(tmp_path):
    model, whole = jpt.load(changed('modelopt_nvfp4', tmp_path, half)), jpt.load(GOLDEN / 'modelopt_nvfp4')
    assert [(len(part.kinds), part.repeats) for part in whole.config.segments] == [(1, 2)]
    assert [(len(part.kinds), part.repeats) for part in model.config.segments] == [(2, 1)]
    first, second = model.params['layers'][0]
    assert first['mlp']['up']['kernel'].dtype == ml_dtypes.bfloat16
    before = whole.params['layers'][0][0]
    assert_same(second, jax.tree.map(lambda leaf: leaf[1:], before))
    assert_same(first['mlp']['down'], jax.tree.map(lambda leaf: leaf[:1], before['mlp']['down']))


def weights(**fields):
    return lambda said: said['config_groups']['group_0']['weights'].update(fields)


@pytest.mark.parametrize(
    ('name', 'config', 'beside', 'words'),
    [
        ('modelopt_nvfp4', None, {'quant_algo': 'FP8'}, 'say different things'),
        ('modelopt_nvfp4', None, {'group_size': 32}, r'group_size=32: expected 16 \(NVFP4\)'),
        ('modelopt_nvfp4', None, {'rotation': 'hadamard'}, 'fields that jpt does not know: rotation'),
        ('modelopt_nvfp4', lambda said: said.update(lora_rank=4), {}, 'fields that jpt does not know: lora_rank'),
        (
            'modelopt_int4_awq',
            None,
            {'quant_algo': 'W4A8_MXFP4_FP8'},
            "quant_algo='W4A8_MXFP4_FP8': expected one of FP8, ",
        ),
        ('modelopt_int4_awq', None, {'has_zero_point': True}, 'expected codes around zero'),
        ('compressed_w4a16', weights(symmetric=False), {}, 'weights.symmetric=False'),
        ('compressed_w4a16', weights(actorder='group'), {}, "actorder='group'"),
        ('compressed_w4a16', weights(num_bits=3), {}, 'weights of 3 bits'),
        ('compressed_w4a16', weights(dynamic=True), {}, 'weights.dynamic=True: expected False'),
        ('compressed_w4a16', weights(rotation=1), {}, 'expected an object of num_bits'),
        ('compressed_w4a16', lambda said: said.update(format='dense'), {}, None),
        (
            'compressed_w4a16',
            lambda said: said['config_groups']['group_0'].update(format='int-quantized'),
            {},
            "format='int-quantized': expected 'pack-quantized'",
        ),
        ('compressed_w4a16', lambda said: said.update(sparsity_config={'format': '2:4'}), {}, 'sparsity_config'),
        ('compressed_w4a16', lambda said: said.update(rotation=1), {}, 'fields that jpt does not know: rotation'),
        (
            'compressed_w4a16',
            lambda said: said['config_groups']['group_0'].update(targets=['Embedding']),
            {},
            "targets: 'Embedding': expected 'Linear'",
        ),
        ('compressed_fp8_block', weights(block_structure=[64, 128]), {}, r'weight_scale: has shape \[2, 1\], expected'),
    ],
)
def test_configs_that_say_otherwise_are_refused(name, config, beside, words, tmp_path):
    directory = changed(name, tmp_path, config=config or (lambda said: None), beside=lambda said: said.update(beside))
    if words is None:  # a group's own format goes before that of the whole
        jpt.load(directory)
        return
    with pytest.raises(ValueError, match=words):
        jpt.load(directory)
