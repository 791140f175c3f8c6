"""Training of a model whose keys and values are kept in eight bits: through the rounding, and never of its scales."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import settings

import jpt
from jpt.training.job import make_job
from jpt.training.run import run_job
from jpt.training.settings import LoraConfig


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, 'devices', lambda *args: jax.local_devices()[:1])


@pytest.fixture(scope='module')
def rounded(tmp_path_factory):
    """The quickstart's teacher in float32 with scales that leave keys and values a few codes each."""
    teacher = jpt.load('quickstart', dtype='float32')
    params = jax.tree.map(lambda leaf: leaf, teacher.params)
    params['layers'][0][0]['attn'] |= {'k_scale': np.full(4, 2000.0, 'f'), 'v_scale': np.full(4, 1500.0, 'f')}
    folder = tmp_path_factory.mktemp('rounded') / 'model'
    cfg = dataclasses.replace(teacher.config, kv_cache='fp8')
    dataclasses.replace(teacher, config=cfg, params=jax.tree.map(jax.numpy.asarray, params)).save(folder)
    return str(folder)


@pytest.mark.parametrize('lora', [None, dataclasses.asdict(LoraConfig(rank=2, alpha=4.0))], ids=['whole', 'adapters'])
def test_scales_stay_to_the_bit_whatever_is_trained(rounded, lora, tmp_path):
    config = settings(
        tmp_path,
        model={'path': rounded},
        tokenizer=None,
        lora=lora,
        steps=2,
        optimizer={'weight_decay': 0.5},
        checkpoint={'every': 1, 'export': True},
    )
    job = make_job(config)
    assert job.state.params['layers'][0][0]['attn']['k_scale'] is None
    model = run_job(config, tmp_path / 'run')
    before = jpt.load(rounded).params['layers'][0][0]['attn']
    exported, saved = jpt.load(tmp_path / 'run' / 'model'), jpt.load(tmp_path / 'run')
    for one in (model, saved, exported):
        assert one.config.kv_cache == 'fp8'
        found = one.params['layers'][0][0]['attn']
        np.testing.assert_array_equal(found['k_scale'], np.full(4, 2000.0, 'f'))
        np.testing.assert_array_equal(found['v_scale'], np.full(4, 1500.0, 'f'))
        for name in ('k', 'v'):  # gradients reach them through the rounding
            assert np.abs(np.asarray(found[name]['kernel']) - np.asarray(before[name]['kernel'])).max() > 0


def test_a_student_learns_what_its_cache_costs(rounded, tmp_path):
    """Distilled from itself without the rounding, it comes nearer to that."""
    config = settings(
        tmp_path,
        task='distill',
        model={'path': rounded},
        teacher={'path': 'quickstart'},
        tokenizer=None,
        steps=6,
        schedule={'lr': 1e-4, 'warmup': 0},
    )
    run_job(config, tmp_path / 'run')
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    found = [row['kl'] for row in rows if 'kl' in row]
    assert found[0] > 0.1
    assert found[-1] < 0.7 * found[0]
