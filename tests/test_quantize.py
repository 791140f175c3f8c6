"""python -m jpt.quantize: what it writes, what it reports, and what it refuses."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import jpt
from jpt.convert import convert
from jpt.data.config import TextConfig
from jpt.model import Model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.quant.formats import FORMATS
from jpt.quant.paths import paths
from jpt.quant.tensors import QTensor
from jpt.quantization.settings import AutoConfig, CalibrationConfig, QuantizeConfig
from jpt.quantize import quantize, quantize_files
from jpt.sharding.mesh import MeshConfig, make_mesh

TEACHER = pathlib.Path(__file__).resolve().parents[1] / 'jpt' / 'assets' / 'quickstart_teacher'
SMALL = {
    'model_type': 'llama', 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'vocab_size': 4096,
    'num_attention_heads': 2, 'num_key_value_heads': 1, 'head_dim': 16, 'max_position_embeddings': 64,
    'tie_word_embeddings': True,
}  # fmt: skip
SMOOTH = CalibrationConfig(factors='smoothquant')
PARTS = {'attn/q', 'attn/k', 'attn/v', 'attn/out', 'mlp/up', 'mlp/gate', 'mlp/down'}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A Hugging Face directory of a tiny model with the quickstart's tokenizer."""
    cfg = config_from_hf(SMALL)
    folder = tmp_path_factory.mktemp('checkpoint') / 'model'
    Model(cfg, jax.jit(init, static_argnums=0)(cfg, jax.random.key(0)), None, TEACHER).export(folder)
    return str(folder)


def settings(checkpoint, tmp_path, **changes):
    for name in ('train', 'held_out'):
        (tmp_path / f'{name}.txt').write_text(f'def {name}(x):\n    return x\n' * 9)
    train, held_out = (str(tmp_path / f'{name}.txt') for name in ('train', 'held_out'))
    text = TextConfig.of_files(train, held_out, rows=4, length=32, batch_size=2)
    return dataclasses.replace(QuantizeConfig(model=checkpoint, text=text), **changes)


def test_what_is_written_and_reported(checkpoint, tmp_path):
    recipe = (('layers/**', 'int8'), ('**/mlp/down', 'nvfp4'), ('**/attn/out', 'none'))
    made = quantize(settings(checkpoint, tmp_path, recipe=recipe), tmp_path / 'out')
    report = json.loads((tmp_path / 'out' / 'quantize.json').read_text())
    assert {row['path'].split('/', 2)[2].removesuffix('/kernel') for row in report['layers']} == PARTS - {'attn/out'}
    assert len(report['layers']) == 2 * 6  # two layers
    assert report['not_quantized'] == ['embed/embedding', 'layers/0.0/attn/out/kernel']
    assert report['text']['calibration']['paths'] == [str(tmp_path / 'train.txt')]
    original, quantized = report['models']
    assert original['kl'] == pytest.approx(0, abs=1e-6)
    assert quantized['kl'] > 0
    assert quantized['perplexity'] == pytest.approx(np.exp(quantized['loss']))
    assert (tmp_path / 'out' / 'quantize.png').read_bytes().startswith(b'\x89PNG')

    again = jpt.load(tmp_path / 'out')
    kernel = again.params['layers'][0][0]['mlp']['down']['kernel']
    assert kernel.format == FORMATS['nvfp4']
    assert kernel.input_scale.shape == (2,)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(again.params))
    assert quantized['bytes'] == stored < original['bytes']
    # The error of a weight, from the files alone.
    before = jpt.load(checkpoint).params['layers'][0][0]['mlp']['up']['kernel']
    after = jpt.load(tmp_path / 'out', dtype='float32').params['layers'][0][0]['mlp']['up']['kernel']
    row = next(row for row in report['layers'] if row['path'].endswith('up/kernel') and row['layer'] == 1)
    one, other = (np.asarray(x[1], np.float64) for x in (before, after))
    assert row['error'] == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(one), rel=1e-4)
    assert row['amax'] == pytest.approx(np.abs(one).max())
    assert [row.snr for row in made.layers] == sorted(row.snr for row in made.layers)  # the worst first


def test_a_hugging_face_directory(checkpoint, tmp_path):
    made = quantize(settings(checkpoint, tmp_path, recipe=(('layers/**', 'fp8_tensor'),), to='hf'), tmp_path / 'out')
    assert (tmp_path / 'out' / 'hf_quant_config.json').is_file()
    again = jpt.load(tmp_path / 'out')
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(made.model.params), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    assert isinstance(again.params['layers'][0][0]['attn']['q']['kernel'], QTensor)


def test_layers_apart_with_a_cache_in_either_kind_of_directory(checkpoint, tmp_path):
    """Each layer in its own format, keys and values rounded: the same numbers from both, whole or a part."""
    recipe = (('layers.0/**', 'nvfp4'), ('layers.1/**', 'fp8_tensor'))
    given = settings(checkpoint, tmp_path, recipe=recipe, kv_cache='fp8')
    for to in ('hf', 'jpt'):
        quantize(dataclasses.replace(given, to=to), tmp_path / to)
        convert(tmp_path / to, tmp_path / f'{to}_small', 'hf', layers=(1,), dtype='float32')
    for name in ('', '_small'):
        one, other = (jpt.load(tmp_path / f'{to}{name}') for to in ('hf', 'jpt'))
        assert one.config.kv_cache == other.config.kv_cache == 'fp8'
        assert paths(one.params) == paths(other.params)
        for left, right in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_array_equal(np.asarray(left).view(np.uint8), np.asarray(right).view(np.uint8))
    whole, small = jpt.load(tmp_path / 'hf'), jpt.load(tmp_path / 'hf_small')
    assert (whole.config.num_layers, small.config.num_layers) == (2, 1)
    assert small.params['layers'][0][0]['attn']['k_scale'] == whole.params['layers'][0][1]['attn']['k_scale']


def test_files_of_a_model_with_a_cache_in_eight_bits(checkpoint, tmp_path):
    """What is quantized from files to files keeps the scales of keys and values."""
    first = settings(checkpoint, tmp_path, recipe=(('layers/**', 'none'),), kv_cache='fp8')
    quantize(first, tmp_path / 'cache')
    then = QuantizeConfig(model=str(tmp_path / 'cache'), recipe=(('layers/**', 'fp8_weights'),), stream=True, to='hf')
    quantize_files(then, tmp_path / 'out')
    before, after = (jpt.load(tmp_path / name) for name in ('cache', 'out'))
    assert after.config == before.config
    for name in ('k_scale', 'v_scale'):
        wanted = before.params['layers'][0][0]['attn'][name]
        np.testing.assert_array_equal(after.params['layers'][0][0]['attn'][name], wanted)
        assert np.all(wanted != 1)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'recipe': (('layers/**/qq', 'int8'),)}, r"recipe\.0: the pattern 'layers/\*\*/qq' matches nothing"),
        ({'recipe': (('**/mlp', 'none'),)}, 'nothing is quantized'),
        ({'model': 'no/such/place'}, 'no/such/place'),
        ({'recipe': (('layers/**', 'int8_weights'),), 'calibration': SMOOTH}, "expected 'awq'"),
        (
            {'calibration': CalibrationConfig(factors='awq'), 'to': 'hf'},
            "config.to='hf': expected 'jpt'.*no input_factor",
        ),
    ],
)
def test_what_does_not_hold_is_said_before_anything_is_measured(changes, words, checkpoint, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=f'(?s){words}'):
        quantize(settings(checkpoint, tmp_path, **changes), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_weights_that_are_no_numbers_are_named(checkpoint, tmp_path):
    model = jpt.load(checkpoint)
    kernel = model.params['layers'][0][0]['mlp']['up']['kernel']
    model.params['layers'][0][0]['mlp']['up']['kernel'] = kernel.at[1, 3, 5].set(np.nan)
    model.save(tmp_path / 'broken')
    with pytest.raises(ValueError, match=r'layers/0\.0/mlp/up/kernel: holds NaN'):
        quantize(settings(str(tmp_path / 'broken'), tmp_path), tmp_path / 'out')


def test_nothing_is_overwritten_and_nothing_is_quantized_twice(checkpoint, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='out'):
        quantize(settings(checkpoint, tmp_path), tmp_path / 'out')
    given = settings(checkpoint, tmp_path, recipe=(('layers/**', 'int8_weights'),))
    quantize(given, tmp_path / 'one')
    with pytest.raises(ValueError, match='is a QTensor: expected weights as they are; ask for a dtype'):
        quantize(dataclasses.replace(given, model=str(tmp_path / 'one')), tmp_path / 'two')


def test_on_a_mesh_it_is_what_it_is_on_one_device(checkpoint, tmp_path):
    recipe = (('layers/**', 'fp8_tensor'), ('**/mlp/{up,gate}', 'nvfp4'), ('**/attn/q', 'int8_weights'))
    given = settings(checkpoint, tmp_path, recipe=recipe, kv_cache='fp8')
    alone = quantize(given, tmp_path / 'alone')
    mesh = MeshConfig(pipe=2, data=2, tensor=2)
    spread = quantize(dataclasses.replace(given, mesh=mesh), tmp_path / 'spread')
    assert spread.models[1].loss == pytest.approx(alone.models[1].loss, rel=1e-3)
    assert spread.models[1].bytes == alone.models[1].bytes
    one, other = (jpt.load(tmp_path / name).params for name in ('alone', 'spread'))
    for path, x, y in zip(paths(one), jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if path.endswith(('input_scale', 'k_scale', 'v_scale')):  # of sums in another order
            np.testing.assert_allclose(x, y, rtol=1e-4)
        else:
            np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    # Restored on another mesh, exported from there and read again: the same bits.
    moved = jpt.load(tmp_path / 'spread', mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    moved.export(tmp_path / 'hf')
    again = jpt.load(tmp_path / 'hf').params
    assert paths(again) == paths(other)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    with pytest.raises(ValueError, match=r'batch size 2 is not a multiple of data=8'):
        quantize(dataclasses.replace(given, mesh=MeshConfig()), tmp_path / 'out')


def test_formats_by_layer_under_a_budget(checkpoint, tmp_path):
    auto = AutoConfig(('nvfp4', 'fp8_tensor'), 5.5)
    made = quantize(settings(checkpoint, tmp_path, auto=auto, to='hf'), tmp_path / 'out')
    report = json.loads((tmp_path / 'out' / 'quantize.json').read_text())
    assert {row['chosen'] for row in report['auto']['groups']} == {'nvfp4', 'fp8_tensor'}
    again = jpt.load(tmp_path / 'out')
    tensors = [
        t for t in jax.tree.leaves(again.params, is_leaf=lambda x: isinstance(x, QTensor)) if isinstance(t, QTensor)
    ]
    bits = sum(8 * p.nbytes for t in tensors for p in (t.codes, t.scale, *([] if t.scale_2 is None else [t.scale_2])))
    assert report['auto']['bits_chosen'] == pytest.approx(bits / sum(np.prod(t.shape) for t in tensors))
    assert bits / sum(np.prod(t.shape) for t in tensors) <= 5.5
    # The recipe that is reported makes the same files.
    recipe = tuple((pattern, name) for pattern, name in report['auto']['recipe'])
    quantize(settings(checkpoint, tmp_path, recipe=recipe, to='hf'), tmp_path / 'by_recipe')
    other = jpt.load(tmp_path / 'by_recipe')
    assert other.config == again.config == made.model.config
    for model in (other, made.model):
        for one, same in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(same).view(np.uint8))
    again.save(tmp_path / 'jpt')
    assert jpt.load(tmp_path / 'jpt').config == again.config
