"""Quantizing from files to files: the bits of the in-memory way, what is read and how often, and what is refused."""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpt
from jpt.checkpoint.hf_export import write_hf
from jpt.checkpoint.model_dir import write_model
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.source import TreeSource, leaves_of, load_tree
from jpt.config import ConfigError
from jpt.data.config import TextConfig
from jpt.models.names import get
from jpt.quant.formats import FORMATS, Format
from jpt.quant.recipes import chosen, recipe_of
from jpt.quantization import streaming
from jpt.quantization.calibrated import quantized_params
from jpt.quantization.settings import AutoConfig, CalibrationConfig, QuantizeConfig
from jpt.quantization.streaming import QuantizedSource
from jpt.quantize import quantize_files

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'checkpoint'))
from quantized_models import BLOCKS, EXPERTS, LLAMA, assert_same, whole_model

EVERYTHING = 'layers/**'
# Matrices of one shape, which 16 does not divide: few programs are compiled.
SQUARE = {'intermediate_size': 40, 'num_key_value_heads': 2}
DENSE, EXPERTS = LLAMA | SQUARE, EXPERTS | SQUARE | {'moe_intermediate_size': 40, 'num_experts': 2}
EVEN = DENSE | {'hidden_size': 32, 'head_dim': 16, 'intermediate_size': 32}
# Name: format, model, what the weights are read from, and whether a Hugging Face directory holds them.
CASES = {
    'blocks of experts': (BLOCKS, EXPERTS, 'hf', True),
    'nvfp4 of experts': (FORMATS['nvfp4_weights'], EXPERTS, 'jpt', False),
    'nvfp4': (FORMATS['nvfp4_weights'], EVEN, 'hf', True),
    'mxfp8': (FORMATS['mxfp8'], DENSE, 'jpt', True),
    'rows': (FORMATS['int8_weights'], DENSE, 'hf', True),
    'two in a byte': (dataclasses.replace(FORMATS['int4_weights'], columns=8), DENSE, 'jpt', True),
    'one scale': (Format('e4m3'), DENSE, 'hf', True),
    'columns': (Format('int4', 0, 1), DENSE, 'jpt', False),
    'odd blocks': (Format('int4', 3, 5, 'float32'), DENSE, 'hf', False),
    'powers of two': (dataclasses.replace(BLOCKS, scale='power_of_two'), DENSE, 'jpt', True),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Matrices of 40 x 40 in several pieces, two of them in what is read at a time."""
    monkeypatch.setattr(streaming, 'PIECE', 300)
    monkeypatch.setattr(streaming, 'READ', 700)


class Counting:
    """A source that counts how often each element of each leaf is read, and the most that is read at a time."""

    def __init__(self, source):
        self.cfg, self.quantized, self.dtype, self._source = source.cfg, source.quantized, source.dtype, source
        self.counts = {leaf.path: np.zeros(leaf.shape, int) for leaf in leaves_of(source)}
        self.largest = 0

    def read(self, leaf, index):
        self.counts[leaf.path][index] += 1
        found = self._source.read(leaf, index)
        if leaf.path[0] == 'layers' and leaf.path[-1] == 'kernel':
            self.largest = max(self.largest, found.size)
        return found


def counting(model, form, pattern=EVERYTHING):
    formats = chosen(model.params, recipe_of([(pattern, form)]))
    source = Counting(TreeSource(model.config, model.params))
    return source, QuantizedSource(source, formats)


@pytest.mark.parametrize('name', CASES)
def test_the_bits_are_those_of_the_whole_weight(name, tmp_path):
    form, fields, kind, exported = CASES[name]
    model = whole_model(fields)
    kernel = model.params['layers'][0][0]['attn']['k']['kernel']
    odd = kernel.at[0].multiply(2.0**-100).at[1, 3].set(0)  # a layer of tiny numbers, a row of zeros
    model.params['layers'][0][0]['attn']['k']['kernel'] = odd
    getattr(model, {'hf': 'export', 'jpt': 'save'}[kind])(tmp_path / 'model')
    formats = chosen(model.params, recipe_of([(EVERYTHING, form)]))
    wanted = quantized_params(model.params, formats, None, CalibrationConfig(), {}, {})

    def source():
        return QuantizedSource(open_model(tmp_path / 'model').source, formats)

    assert_same(load_tree(source()), wanted)
    write_model(source(), tmp_path / 'jpt')
    assert_same(jpt.load(tmp_path / 'jpt').params, wanted)
    if exported:
        write_hf(source(), tmp_path / 'hf', max_shard_size=3000)
        assert_same(jpt.load(tmp_path / 'hf').params, wanted)
    else:
        with pytest.raises(ValueError, match='layout'):
            write_hf(source(), tmp_path / 'hf')


@pytest.mark.parametrize('write', [write_hf, write_model])
@pytest.mark.parametrize(
    ('form', 'fields', 'passes'),
    [
        (BLOCKS, EXPERTS, {1}),
        (FORMATS['nvfp4_weights'], EVEN, {2}),  # its second scale is of all
        (Format('e4m3'), DENSE, {2}),
    ],
)
def test_weights_are_read_as_often_as_the_format_needs(write, form, fields, passes, tmp_path):
    read, source = counting(whole_model(fields), form)
    write(source, tmp_path / 'out')
    for path, packing in source.quantized.items():
        assert packing.form == form
        first, *others = read.counts[path]
        assert set(np.unique(others)) == passes, path
        # transformers' compressed-tensors has scales in the weight's dtype where it holds them: the first layer tells.
        assert set(np.unique(first)) <= passes | {max(passes) + (write is write_hf and not form.rows)}
    assert read.largest <= 1.5 * 700 + 40 * form.rows  # what it aims at, and a row of blocks


def test_a_part_needs_no_more_than_its_blocks():
    random = np.random.default_rng(0)
    for form in (Format('int4', 3, 6), FORMATS['int8_weights'], BLOCKS):
        model = whole_model(EXPERTS)
        formats = chosen(model.params, recipe_of([('layers/**/down', form)]))
        wanted = quantized_params(model.params, formats, None, CalibrationConfig(), {}, {})
        read, source = counting(model, form, 'layers/**/down')
        for leaf in (each for each in leaves_of(source) if each.part is not None):
            for _ in range(8):
                ends = [np.sort(random.choice(size + 1, 2, replace=False)) for size in leaf.shape]
                index = tuple(slice(int(a), int(b), int(random.integers(1, 3))) for a, b in ends)
                before = read.counts[leaf.path[:-1]].copy()
                found = source.read(leaf, index)
                np.testing.assert_array_equal(found, np.asarray(get(wanted, leaf.path))[index])
                touched = np.argwhere(read.counts[leaf.path[:-1]] > before)
                unit = (
                    (1, 1, form.rows, form.columns or 40)
                    if leaf.part == 'scale'
                    else (1, 1, 1, 2 if form.packed else 1)
                )
                for at, part in enumerate(index):
                    block = form.rows if at == 2 else (form.columns or 40) if at == 3 else 1
                    first, last = part.start * unit[at], part.stop * unit[at]
                    if len(touched):
                        assert touched[:, at].min() >= first // block * block
                        assert touched[:, at].max() < math.ceil(last / block) * block


def test_what_is_reported_of_weights():
    """Against numpy in float64, from the tensors alone."""
    model = whole_model(EXPERTS)
    for form in (FORMATS['nvfp4_weights'], BLOCKS):
        _, source = counting(model, form)
        made = load_tree(source)
        for row in source.reports():
            keys = [int(key) if key.isdecimal() else key for key in row.path.replace('.', '/').split('/')]
            weight = np.asarray(get(model.params, keys)[row.layer], np.float64)
            tensor = get(made, keys)
            codes = np.asarray(tensor.codes[row.layer])
            scale = np.asarray(tensor.scale[row.layer]).astype(np.float64)
            if form.packed:
                codes = np.stack([codes & 15, codes >> 4], -1).reshape(weight.shape)
                sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
                codes = np.where(codes > 7, -1, 1) * sizes[codes & 7]
                scale = scale * np.asarray(tensor.scale_2[row.layer], np.float64)
            spread = np.repeat(np.repeat(scale, form.rows, -2), form.columns, -1)
            spread = spread[..., : weight.shape[-2], : weight.shape[-1]]
            error = np.linalg.norm(codes.astype(np.float64) * spread - weight) / np.linalg.norm(weight)
            assert row.error == pytest.approx(error, rel=1e-5)
            assert row.amax == np.abs(weight).max()
            clipped = np.mean(np.abs(weight) > spread * form.largest * (1 + 2.0**-20))
            assert row.clipped == pytest.approx(clipped, abs=1e-9)
            assert (clipped > 0) == (form.scale == 'e4m3')
        assert len(source.reports()) == 2 * len(source.quantized)


def settings(path, **changes):
    return dataclasses.replace(QuantizeConfig(model=str(path), stream=True), **changes)


def test_the_command(tmp_path):
    """From a Hugging Face directory to one in several files; what a killed run has left does not matter."""
    model = whole_model(DENSE)
    model.export(tmp_path / 'model')
    for left in ('out.new', 'out.new.incomplete'):
        (tmp_path / left).mkdir()
        (tmp_path / left / 'model.safetensors').write_text('half')
    recipe = ((EVERYTHING, 'fp8_block'), ('**/attn/out', 'none'))
    made = quantize_files(settings(tmp_path / 'model', recipe=recipe, to='hf', max_shard_size='9KB'), tmp_path / 'out')
    assert {path.name for path in tmp_path.iterdir()} == {'model', 'out'}
    assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 1
    formats = chosen(model.params, recipe_of([(EVERYTHING, 'fp8_block'), ('**/attn/out', None)]))
    wanted = quantized_params(model.params, formats, None, CalibrationConfig(), {}, {})
    assert_same(jpt.load(tmp_path / 'out').params, wanted)
    report = json.loads((tmp_path / 'out' / 'quantize.json').read_text())
    assert [row['error'] for row in report['layers']] == [row.error for row in made.layers]
    assert len(report['layers']) == 2 * 6
    assert 'layers/0.0/attn/out/kernel' in report['not_quantized']
    sizes = [sum(part.nbytes for part in jax.tree.leaves(each)) for each in (model.params, wanted)]
    assert [row['bytes'] for row in report['models']] == sizes


def test_a_search_finds_the_same_scales(tmp_path):
    model = whole_model(DENSE)
    model.save(tmp_path / 'model')
    how = CalibrationConfig(weights='mse')
    recipe = ((EVERYTHING, 'int4_weights'),)
    made = quantize_files(settings(tmp_path / 'model', recipe=recipe, calibration=how), tmp_path / 'out')
    formats = chosen(model.params, recipe_of('int4_weights'))
    assert_same(jpt.load(tmp_path / 'out').params, quantized_params(model.params, formats, None, how, {}, {}))
    assert max(row.clipped for row in made.layers) > 0


def test_weights_that_are_no_numbers_are_named(tmp_path):
    model = whole_model(EXPERTS)
    down = model.params['layers'][0][0]['mlp']['experts']['down']
    down['kernel'] = down['kernel'].at[1, 1, 20, 3].set(jnp.inf)
    model.save(tmp_path / 'model')
    for name in ('fp8_block_weights', 'nvfp4_weights'):
        with pytest.raises(ValueError, match='experts/down/kernel: holds NaN or infinities in layer 1, expert 1'):
            quantize_files(settings(tmp_path / 'model', recipe=((EVERYTHING, name),)), tmp_path / 'out')
        assert {path.name for path in tmp_path.iterdir()} == {'model'}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'calibration': CalibrationConfig(factors='awq')}, r"calibration\.factors='awq': expected 'none' with stream"),
        ({'calibration': CalibrationConfig(inputs='percentile')}, r"calibration\.inputs='percentile': expected 'max'"),
        ({'calibration': CalibrationConfig(weights='weighted_mse')}, "expected 'max' or 'mse' with stream=True"),
        ({'text': TextConfig(rows=3)}, r'text\.rows=3: expected 128 with stream=True'),
        ({'text': TextConfig.of_files('a.txt', 'b.txt')}, r"text\.calibration\.paths=\('a.txt',\): expected"),
        ({'max_shard_size': '9 parrots'}, r"max_shard_size='9 parrots'"),
        ({'recipe': (('layers.0/**', 'int8'),)}, 'without numbers of layers'),
        ({'kv_cache': 'fp8'}, "kv_cache='fp8': expected 'as_it_is' with stream"),
        ({'auto': AutoConfig(('int8',))}, r'auto\.formats=.*with stream=True'),
    ],
)
def test_settings_without_effect_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings('quickstart', **changes)


def test_formats_that_need_inputs_are_refused(tmp_path):
    for name in ('fp8_tensor', 'nvfp4'):
        with pytest.raises(
            ValueError, match=r'static scale of inputs, .* expected one of fp8_channel_token, fp8_block'
        ):
            quantize_files(settings('quickstart', recipe=((EVERYTHING, name),)), tmp_path / 'out')
    recipe = ((EVERYTHING, 'int4_weights'), ('**/attn', 'fp8_block_ue8m0'))
    with pytest.raises(ValueError, match=r"config\.to='hf': expected 'jpt'"):
        quantize_files(settings('quickstart', recipe=recipe, to='hf'), tmp_path / 'out')
    model = whole_model(DENSE)
    wide = TreeSource(model.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params))
    with pytest.raises(ValueError, match='kernel: is float64: expected 16 or 32 bits'):
        QuantizedSource(wide, {'layers/0.0/attn/q/kernel': BLOCKS})
    with pytest.raises(ValueError, match='attn/qq/kernel: expected the paths of weights'):
        QuantizedSource(wide, {'layers/0.0/attn/qq/kernel': BLOCKS})
