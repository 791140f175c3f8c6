"""Training through rounded weights, adapters on quantized ones, and quantized teachers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import settings

import jpt
from jpt.checkpoint.model_dir import StoredSource
from jpt.checkpoint.source import load_tree
from jpt.config import ConfigError
from jpt.data.config import TextConfig
from jpt.quant.dot import is_weight
from jpt.quant.formats import FORMATS
from jpt.quant.paths import paths
from jpt.quant.recipes import chosen, packed, quantized_tree, recipe_of
from jpt.quant.tensors import FakeQuant, QTensor, quantize
from jpt.quantization.settings import QuantizeConfig
from jpt.quantize import quantize as quantize_checkpoint
from jpt.training.job import make_job
from jpt.training.overview import overview
from jpt.training.run import run_job
from jpt.training.settings import FakeQuantConfig, LoraConfig, ModelSource

RECIPE = FakeQuantConfig((('layers/**', 'nvfp4'), ('**/mlp/down', 'int8'), ('**/attn/out', 'none')))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])


def kinds(params):
    """The weight type of every kernel of the first layers, by name."""
    layer = params['layers'][0][0]
    return {
        f'{part}/{name}': type(layer[part][name]['kernel'])
        for part, names in (('attn', ('q', 'out')), ('mlp', ('up', 'down')))
        for name in names
    }


def losses(folder):
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [row['loss'] for row in rows if 'loss' in row]


def test_a_model_is_trained_through_its_rounding(tmp_path):
    """What is returned computes what was trained, bit by bit; a run goes on where it was stopped."""
    config = settings(tmp_path, quantize=dataclasses.asdict(RECIPE))
    model = run_job(config, tmp_path / 'run')
    assert kinds(model.params) == {
        'attn/q': QTensor, 'attn/out': kinds(jpt.load('quickstart').params)['attn/out'],
        'mlp/up': QTensor, 'mlp/down': QTensor,
    }  # fmt: skip
    found = losses(tmp_path / 'run')
    assert found[-1] < found[0] - 0.5
    job = make_job(config)
    weights = kinds(job.state.params)
    assert [weights[name] for name in ('attn/q', 'mlp/down')] == [FakeQuant, FakeQuant]
    run_job(dataclasses.replace(config, steps=4), tmp_path / 'again')
    again = run_job(config, tmp_path / 'again')
    assert losses(tmp_path / 'again')[4:] == pytest.approx(found[4:], rel=0.2)  # another schedule before
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)

    # The step's own weights, opened as a model, are what was rounded: quantizing them gives the same codes.
    source = StoredSource(tmp_path / 'run')
    assert not source.quantized
    params = load_tree(source)
    rounded = quantized_tree(params, chosen(params, RECIPE.choices()), lambda path, w, form: quantize(w, form))
    for one, other in zip(jax.tree.leaves(rounded), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


def quantized_checkpoint(folder, name):
    teacher = jpt.load('quickstart', dtype='float32')
    formats = chosen(teacher.params, recipe_of(name))
    params = jax.jit(lambda params: quantized_tree(params, formats))(teacher.params)
    dataclasses.replace(teacher, params=params).save(folder / name)
    return str(folder / name)


def test_adapters_are_trained_on_codes(tmp_path):
    path = quantized_checkpoint(tmp_path, 'nvfp4')
    config = settings(
        tmp_path,
        model={'path': path},
        tokenizer=None,
        lora=dataclasses.asdict(LoraConfig(rank=2, alpha=4.0)),
        steps=2,
        checkpoint={'every': 1, 'export': False},
    )
    job = make_job(config)
    kernel = job.state.frozen['model']['layers'][0][0]['attn']['q']['kernel']
    assert isinstance(kernel.base, QTensor)
    model = run_job(config, tmp_path / 'run')
    found = model.params['layers'][0][0]
    assert isinstance(found['mlp']['up']['kernel'], QTensor)  # no adapter
    assert not is_weight(found['attn']['q']['kernel'])  # merged: codes cannot hold it
    # The run's checkpoint, opened as a model, merges the adapter into the numbers of the codes.
    merged = jpt.load(tmp_path / 'run', dtype='float32').params['layers'][0][0]['attn']['q']['kernel']
    np.testing.assert_allclose(merged, found['attn']['q']['kernel'], atol=2e-6)
    before = jpt.load(path, dtype='float32').params['layers'][0][0]['attn']['q']['kernel']
    assert 0 < np.abs(np.asarray(merged) - np.asarray(before)).max() < 0.1


def test_a_quantized_teacher_and_a_student_that_is_it(tmp_path):
    """A student whose weights are rounded like its teacher's has no divergence from it, and its start has one."""
    path = quantized_checkpoint(tmp_path, 'int8')
    common = {'task': 'distill', 'tokenizer': None, 'steps': 1, 'schedule': {'lr': 1e-9, 'warmup': 0}}
    for recipe, holds in (('int8', lambda kl: abs(kl) < 1e-6), ('nvfp4', lambda kl: kl > 1e-3)):
        config = settings(
            tmp_path,
            model={'path': 'quickstart'},
            teacher=dataclasses.asdict(ModelSource(path)),
            quantize={'recipe': (('layers/**', recipe),)},
            **common,
        )
        assert isinstance(make_job(config).state.frozen['teacher']['layers'][0][0]['attn']['q']['kernel'], QTensor)
        run_job(config, tmp_path / recipe)
        rows = [json.loads(line) for line in (tmp_path / recipe / 'metrics.jsonl').read_text().splitlines()]
        assert holds(next(row['kl'] for row in rows if 'kl' in row)), recipe


STATIC = (('layers/**', 'nvfp4'), ('**/mlp/down', 'fp8_tensor'), ('**/attn/out', 'int8_weights'))


@pytest.fixture(scope='module')
def calibrated(tmp_path_factory):
    """The teacher that jpt ships with static scales of inputs."""
    folder = tmp_path_factory.mktemp('calibrated') / 'model'
    text = TextConfig(rows=4, length=64, batch_size=4)
    quantize_checkpoint(QuantizeConfig(model='quickstart', recipe=STATIC, text=text, dtype='float32'), folder)
    return folder


def test_a_calibrated_model_is_trained_with_its_scales(calibrated, tmp_path):
    """Before it is trained it is that model; after, its inputs have the same scales, and it is exported with them."""
    config = settings(
        tmp_path,
        task='distill',
        model={'path': 'quickstart'},
        teacher=dataclasses.asdict(ModelSource(str(calibrated))),
        tokenizer=None,
        quantize={'calibrated': str(calibrated), 'clipped': True},
        steps=2,
        schedule={'lr': 1e-3, 'warmup': 0},
        checkpoint={'every': 1, 'export': True},
        log={'every': 1},
    )
    assert f'rounded  as {calibrated}, gradients clipped;' in overview(make_job(config))
    model = run_job(config, tmp_path / 'run')
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    first, second = (row['kl'] for row in rows if 'kl' in row)
    assert abs(first) < 1e-6
    assert second > 1e-5
    before, exported = jpt.load(calibrated), jpt.load(tmp_path / 'run' / 'model')
    assert paths(before.params) == paths(model.params) == paths(exported.params)
    moved = 0
    for path, old, ours, theirs in zip(
        paths(before.params), *map(jax.tree.leaves, (before.params, model.params, exported.params)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))
        if path.endswith('/input_scale'):
            np.testing.assert_array_equal(old, ours)
        moved += path.endswith('/codes') and bool((np.asarray(old) != np.asarray(ours)).any())
    assert moved == 7
    # A run is opened as a model of the weights that are rounded, and goes on.
    assert not StoredSource(tmp_path / 'run').quantized
    run_job(dataclasses.replace(config, steps=3), tmp_path / 'run')


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ('plain', r'config\.quantize\.calibrated=.*plain: its weights are not quantized: expected what python'),
        ('factors', r'layers/0\.0/attn/q/kernel has an input_factor'),
        ('other', r'layers/0\.0/attn/q/kernel is \(.*\); config\.model has \('),
        ('cache', r"has kv_cache='fp8', and config.model 'as_computed': expected the same"),
        ('nowhere', r'nowhere: no such directory'),
    ],
)
def test_what_is_no_calibrated_model_of_these_weights(given, words, tmp_path):
    teacher = jpt.load('quickstart', dtype='float32')
    if given == 'plain':
        teacher.save(tmp_path / given)
    elif given == 'factors':
        formats = chosen(teacher.params, recipe_of('int4_weights'))
        params = quantized_tree(
            teacher.params,
            formats,
            lambda path, w, form: quantize(w, form, input_factor=np.ones((*w.shape[:-2], w.shape[-1]), np.float32)),
        )
        dataclasses.replace(teacher, params=params).save(tmp_path / given)
    elif given == 'cache':
        text = TextConfig(rows=2, length=16, batch_size=2)
        recipe = (('layers/**', 'fp8_block'),)
        quantize_checkpoint(
            QuantizeConfig(model='quickstart', recipe=recipe, kv_cache='fp8', text=text), tmp_path / given
        )
    elif given == 'other':
        quantized_checkpoint(tmp_path, 'int8')
        (tmp_path / 'int8').rename(tmp_path / given)
    model = {} if given == 'other' else {'path': 'quickstart'}
    config = settings(tmp_path, quantize={'calibrated': str(tmp_path / given)}, **({'model': model} if model else {}))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make_job(config)


def test_a_teacher_on_its_own_mesh_is_not_rounded(tmp_path):
    config = settings(
        tmp_path,
        task='distill',
        model={'path': 'quickstart'},
        teacher={'path': 'quickstart'},
        teacher_mesh={'microbatches': 1},
        record={'likely': 64},
        tokenizer=None,
        quantize={'recipe': (('layers/**', 'int8_weights'),)},
        steps=1,
        schedule={'lr': 1e-9, 'warmup': 0},
    )
    run_job(config, tmp_path / 'run')
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert 0 < next(row['kl'] for row in rows if 'kl' in row) < 0.01


def test_what_cannot_be_exported_is_said_before_the_first_step(tmp_path):
    config = settings(tmp_path, quantize={'recipe': (('layers/**', 'nvfp4'),)}, checkpoint={'every': 3, 'export': True})
    with pytest.raises(ValueError, match='what the run ends with cannot be exported'):
        make_job(config)


def test_training_in_fp8_ends_with_the_weights_it_trained(tmp_path):
    """All three products in eight bits give the losses of float32 to a per cent, and a model of plain weights."""
    found, given = {}, {'float32': None}
    for how, form in (('block', 'fp8_block'), ('tensor', 'fp8_tensor')):
        given[how] = {'recipe': (('layers/**', form),), 'gradients': how, 'result': 'weights'}
    for name, how in given.items():
        config = settings(tmp_path, quantize=how, checkpoint={'every': 7, 'export': name == 'block'})
        model = run_job(config, tmp_path / name)
        found[name] = losses(tmp_path / name)
        assert not is_weight(model.params['layers'][0][0]['mlp']['up']['kernel'])
        if name == 'block':
            exported = jpt.load(tmp_path / name / 'model')
            for one, other in zip(jax.tree.leaves(exported.params), jax.tree.leaves(model.params), strict=True):
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))  # float32 weights, float32 files
            job = make_job(config)
            weights = job.state.params['layers'][0][0]['mlp']['up']['kernel']
            assert (weights.gradients, weights.format) == ('block', FORMATS['fp8_block'])
            assert 'rounded  layers/** fp8_block; gradients block; ends with weights' in overview(job)
    assert found['float32'][-1] < found['float32'][0] - 0.5
    for how in ('block', 'tensor'):
        assert found[how] == pytest.approx(found['float32'], rel=1e-2)
        assert found[how] != found['float32']


def test_clipping_without_any_static_scale_is_refused(tmp_path):
    path = quantized_checkpoint(tmp_path, 'fp8_block')
    config = settings(tmp_path, model={'path': 'quickstart'}, quantize={'calibrated': path, 'clipped': True})
    with pytest.raises(ValueError, match=r'no static scale, so config\.quantize\.clipped=True would change nothing'):
        make_job(config)


def test_settings_that_do_not_hold():
    for name, value in (('gradients', 'block'), ('recipe', (('layers/**', 'int8'),))):
        with pytest.raises(ConfigError, match=f'{name}=.*: expected .* where calibrated is given'):
            FakeQuantConfig(**{'calibrated': 'out/small', name: value})
    with pytest.raises(ConfigError, match='clipped=True: expected False without calibrated'):
        FakeQuantConfig(clipped=True)
    with pytest.raises(ConfigError, match='need no calibration'):
        FakeQuantConfig((('layers/**', 'fp8_tensor'),))
    with pytest.raises(ConfigError, match='expected one of fp8_tensor'):
        FakeQuantConfig((('layers/**', 'fp9'),))
    with pytest.raises(ConfigError, match=r"format 'int8_sq': .*those of python -m jpt\.quantize"):
        FakeQuantConfig((('layers/**', 'int8_sq'),))
    with pytest.raises(ConfigError, match=r"gradients='block': expected 'as_they_are', or another recipe: .*E4M3"):
        FakeQuantConfig((('layers/**', 'fp8_block'), ('**/mlp', 'nvfp4')), gradients='block')


def test_packing_is_what_a_fake_weight_computes_as():
    weight = np.random.default_rng(0).standard_normal((2, 8, 32)).astype(np.float32)
    fake = FakeQuant(weight, format=FORMATS['nvfp4'])
    found = packed({'kernel': fake})['kernel']
    wanted = jax.jit(quantize, static_argnums=1)(weight, FORMATS['nvfp4'])
    np.testing.assert_array_equal(np.asarray(found.codes), np.asarray(wanted.codes))
    np.testing.assert_array_equal(np.asarray(found.scale).view(np.uint8), np.asarray(wanted.scale).view(np.uint8))
