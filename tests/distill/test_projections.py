"""Projections of pairs in a job: drawn from its seed, trained whatever is frozen, resumed exactly, never exported."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

import jpt
from jpt.checkpoint.manager import CheckpointManager
from jpt.checkpoint.safetensors import load_file
from jpt.config import ConfigError, from_config_dict
from jpt.distill.settings import DistillConfig
from jpt.model import Model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.training import job as jobs
from jpt.training import loop
from jpt.training.overview import flops_of, overview
from jpt.training.run import train_model

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'training'))
from tiny import ARCHITECTURE, TOKENIZER, settings

PAIRS = (
    {'student': 'layers.0.output', 'teacher': 'layers.2.output', 'weight': 0.5, 'projection': True},
    {'student': 'layers.1.attention', 'teacher': 'layers.0.attention', 'loss': 'mse', 'projection': True},
)
NAMES = ('cosine-layers.0.output-layers.2.output', 'mse-layers.1.attention-layers.0.attention')
KEYS = tuple(name.replace('.', '_') for name in NAMES)
WIDTHS = (16, 8)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A directory of a model of three layers and half the width."""
    cfg = config_from_hf(ARCHITECTURE | {'hidden_size': WIDTHS[1], 'num_hidden_layers': 3, 'num_attention_heads': 1})
    folder = tmp_path_factory.mktemp('teacher') / 'model'
    Model(cfg, jax.jit(init, static_argnums=0)(cfg, jax.random.key(3)), None, TOKENIZER).export(folder)
    return str(folder)


def distilling(folder, teacher, **changes):
    given = {'task': 'distill', 'teacher': {'path': teacher}, 'distill': {'pairs': PAIRS}, 'eval': {}}
    return settings(folder, **(given | changes))


def maps_of(tree):
    return {name: part['to_teacher']['kernel'] for name, part in tree['projections'].items()}


def test_a_run_that_was_stopped_goes_on_bit_for_bit_and_exports_the_model_alone(tmp_path, teacher, monkeypatch):
    """With adapters and a moving average: the projections are trained beside the adapters."""
    more = {'lora': {'rank': 2}, 'ema': 0.9, 'steps': 4, 'checkpoint': {'every': 4}}
    more |= {'mesh': {'data': 2, 'fsdp': 4}}
    config = distilling(tmp_path, teacher, **more)
    train_model(config, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        patch.setattr(loop, '_asked_to_stop', lambda asked, step: 'test' if step == 2 else None)
        with pytest.raises(loop.StoppedError):
            train_model(config, tmp_path / 'stopped')
    model = train_model(config, tmp_path / 'stopped')

    states = [CheckpointManager(tmp_path / name / 'checkpoints').restore().state for name in ('whole', 'stopped')]
    assert jax.random.key_data(states[0].pop('key')).tolist() == jax.random.key_data(states[1].pop('key')).tolist()
    jax.tree.map(np.testing.assert_array_equal, *states)
    drawn = jobs.first_state(jobs.make_job(config))
    for name, kernel in maps_of(drawn.params).items():
        assert kernel.shape == WIDTHS[::-1]
        assert not np.array_equal(maps_of(states[0]['params'])[name], kernel)
    assert set(maps_of(states[0]['opt_state']['mu'])) == set(maps_of(states[0]['ema'])) == set(KEYS)

    assert 'projections' not in model.params
    exported = tmp_path / 'stopped' / 'model'
    assert not [name for name in load_file(exported / 'model.safetensors') if 'to_teacher' in name]
    adapter = load_file(tmp_path / 'stopped' / 'adapter' / 'adapter_model.safetensors')
    assert all('lora_' in name for name in adapter)
    stored = jpt.load(tmp_path / 'stopped')  # the last step
    assert jax.tree.structure(stored.params) == jax.tree.structure(jpt.load(exported).params)
    model.save(tmp_path / 'saved')
    assert jax.tree.structure(jpt.load(tmp_path / 'saved').params) == jax.tree.structure(stored.params)

    rows = [json.loads(line) for line in (tmp_path / 'stopped' / 'metrics.jsonl').read_text().splitlines()]
    for row in rows:
        weighted = [row[f'{name}-weighted'] for name in NAMES]
        assert weighted == pytest.approx([0.5 * row[NAMES[0]], row[NAMES[1]]], rel=1e-5)
        assert row['loss'] == pytest.approx(row['logits_loss'] + sum(weighted), rel=1e-5)


@pytest.mark.parametrize('freeze', [(), ('**', '!layers/*/attn/q'), ('layers', 'embed')])
def test_projections_are_trained_whatever_is_frozen(tmp_path, teacher, freeze):
    state = jobs.make_job(distilling(tmp_path, teacher, freeze=freeze)).state
    assert {name: kernel.shape for name, kernel in maps_of(state.params).items()} == dict.fromkeys(KEYS, WIDTHS[::-1])
    assert set(maps_of(state.frozen['model']).values()) == {None}
    assert not jax.tree.leaves(maps_of(state.params))[0].sharding.spec[0]  # of the teacher's width all have all


@pytest.mark.parametrize(
    ('freeze', 'words'),
    [(('**',), 'nothing is left to train'), (('projections',), r"the pattern 'projections' matches nothing")],
)
def test_a_model_is_not_frozen_whole_and_projections_are_not_frozen(tmp_path, teacher, freeze, words):
    with pytest.raises(ValueError, match=words):
        jobs.make_job(distilling(tmp_path, teacher, freeze=freeze))


def test_what_a_run_says_of_them(tmp_path, teacher):
    job = jobs.make_job(distilling(tmp_path, teacher), jax.devices()[:1])
    bare = jobs.make_job(distilling(tmp_path, teacher, distill={}), jax.devices()[:1])
    line = f'pairs    0.5 {NAMES[0]}, 1 {NAMES[1]}; 256 parameters of projections'
    assert line in overview(job).splitlines()
    assert flops_of(job) == flops_of(bare) + 6 * 256
    model, without = ([line for line in overview(j).splitlines() if line.startswith('model')] for j in (job, bare))
    assert model == without
    assert 'pairs' not in overview(bare)


@pytest.mark.parametrize(
    ('field', 'value', 'words'),
    [
        ('loss', 'cos', r"config\.distill\.pairs\[0\]\.loss='cos': expected one of 'cosine', 'mse', 'smooth_l1'"),
        ('weight', 0, r'config\.distill\.pairs\[0\]\.weight=0\.0: expected a positive number'),
        ('layer', 1, r'config\.distill\.pairs\[0\]\.layer=1: expected a field of HiddenPair'),
        ('projection', 1, r'config\.distill\.pairs\[0\]\.projection=1: expected True or False'),
    ],
)
def test_a_field_that_does_not_hold_is_named_with_its_pair(field, value, words):
    with pytest.raises(ConfigError, match=words):
        from_config_dict(DistillConfig, {'pairs': ({**PAIRS[0], field: value},)}, 'config.distill')


def test_pairs_are_checked_before_anything_is_read(tmp_path, teacher):
    wrong = ({'student': 'layers.2.output', 'teacher': 'layers.2.output'},)
    with pytest.raises(ValueError, match=r"config\.distill\.pairs\[0\]\.student: 'layers\.2\.output': expected"):
        jobs.make_job(distilling(tmp_path, teacher, distill={'pairs': wrong}))
