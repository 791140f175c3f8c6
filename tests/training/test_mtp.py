"""Modules that predict further tokens against transformers: losses and gradients of a step, on several layouts."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import settings

import jpt
from jpt.convert import convert
from jpt.data.batch import Batch, pack_rows
from jpt.models.config import Compute
from jpt.models.names import to_hf
from jpt.sharding.grads import loss_and_grads
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings
from jpt.training import job as jobs
from jpt.training.auxiliary import Auxiliary
from jpt.training.mtp import ahead, mtp_counts
from jpt.training.objective import language_modeling

MODEL = pathlib.Path(__file__).parents[1] / 'golden' / 'mtp' / 'deepseek_v3'


@functools.cache
def opened():
    return jpt.load(MODEL), np.load(MODEL / 'golden.npz')


LAYOUTS = {
    'one': {},
    'pipe-expert-context': {'pipe': 2, 'expert': 2, 'context': 2},
    'fsdp-context': {'fsdp': 2, 'context': 4},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_step_has_the_losses_and_gradients_of_transformers(layout):
    """loss + (loss_1 + loss_2) / 2: module k predicts token t + k + 1, from within the row's text alone."""
    model, golden = opened()
    sizes = LAYOUTS[layout]
    mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), None if sizes else jax.devices()[:1])
    objective = language_modeling(model.config, Compute(remat='full' if sizes else 'none'), Auxiliary(mtp=1.0))
    params = jax.device_get(model.params)
    frozen = {'model': jax.tree.map(lambda leaf: None, params)}
    plan = make_plan(mesh, {'model': model.config}, params, frozen)
    rows = [[(row, np.ones(len(row)))] for row in golden['tokens']]
    batch = jax.tree.map(jnp.asarray, pack_rows(rows, 24))
    place = functools.partial(to_device_layout, plan.layouts['model'])
    step = jax.jit(lambda params, batch: loss_and_grads(objective, params, frozen, batch, plan))
    placed = jax.device_put(place(params), shardings(mesh, plan.specs))
    total, grads, sums = step(placed, jax.device_put(batch, batch_shardings(mesh, batch)))

    wanted = golden['loss'] + (golden['loss_1'] + golden['loss_2']) / 2
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    for name, key in (('loss', 'loss'), ('mtp_1', 'loss_1'), ('mtp_2', 'loss_2')):
        value, count = sums[name]
        assert float(value) / float(count) == pytest.approx(golden[key], rel=1e-5), name
    counts = [float(sums[name][1]) for name in ('loss', 'mtp_1', 'mtp_2')]
    assert counts == pytest.approx([2 * 23, 2 * 22, 2 * 21])
    np.testing.assert_array_equal(np.asarray(sums['load'][0]).sum(axis=1), 2 * 2 * np.array([0, 23, 22, 21]))

    found = to_hf(model.config, to_canonical_layout(plan.layouts['model'], jax.device_get(grads)))
    gradients = {key.removeprefix('grad/'): golden[key] for key in golden.files if key.startswith('grad/')}
    assert set(gradients) < set(found)
    least = 1e-6 * np.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients.values()))
    for name, gradient in gradients.items():
        error = np.linalg.norm(found[name] - gradient) / max(np.linalg.norm(gradient), least)
        assert error < 1e-4, (name, error)


def test_accuracies_are_those_of_the_logits_of_transformers():
    """Of every module by itself: how often its best guess is the token that comes."""
    model, golden = opened()
    batch = jax.tree.map(jnp.asarray, pack_rows([[(row, np.ones(len(row)))] for row in golden['tokens']], 24))
    objective = language_modeling(model.config, Compute(), Auxiliary(mtp=0.3))

    @jax.jit
    def metrics(params):
        nothing = {'model': jax.tree.map(lambda leaf: None, params)}
        carry = objective.first(params, nothing, batch)
        carry = objective.stage(params['layers'], {'model': nothing['model']['layers']}, carry, batch)
        return objective.last(params, nothing, carry, batch, objective.counts(batch))

    total, sums = metrics(model.params)
    assert float(total) == pytest.approx(golden['loss'] + 0.3 * (golden['loss_1'] + golden['loss_2']) / 2, rel=1e-5)
    for depth in (1, 2):
        logits, tokens = golden[f'logits_{depth}'], golden['tokens'][:, depth + 1 :]
        hits = np.mean(logits[:, : tokens.shape[1]].argmax(axis=-1) == tokens)
        value, count = sums[f'mtp_{depth}_accuracy']
        assert float(value) / float(count) == pytest.approx(hits, abs=1e-6)


def test_texts_are_seen_from_ahead_each_by_itself():
    """Two texts and padding in a row; the last places of a text have no further token, weights stay with targets."""
    row = np.array([[10, 11, 12, 13, 20, 21, 0]])
    batch = Batch(
        tokens=row,
        targets=np.array([[11, 12, 13, 14, 21, 22, 0]]),
        loss_mask=np.array([[0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 0.0]]),
        positions=np.array([[0, 1, 2, 3, 0, 1, 0]]),
        segment_ids=np.array([[1, 1, 1, 1, 2, 2, 0]]),
    )
    # A target that weighs nothing may be anything; the token that follows is read off the tokens.
    batch = batch._replace(targets=np.where(batch.loss_mask > 0, batch.targets, 77))
    first, second = ahead(jax.tree.map(jnp.asarray, batch), 2)
    np.testing.assert_array_equal(first.segment_ids, [[1, 1, 1, 0, 2, 0, 0]])
    np.testing.assert_array_equal(np.where(first.segment_ids, first.tokens, -1), [[11, 12, 13, -1, 21, -1, -1]])
    np.testing.assert_array_equal(np.where(first.segment_ids, first.targets, -1), [[12, 13, 14, -1, 22, -1, -1]])
    np.testing.assert_array_equal(first.loss_mask, [[0.5, 1.0, 2.0, 0, 8.0, 0, 0]])
    np.testing.assert_array_equal(second.segment_ids, [[1, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(np.where(second.segment_ids, second.tokens, -1), [[12, 13, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(np.where(second.segment_ids, second.targets, -1), [[13, 14, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(second.loss_mask, [[1.0, 2.0, 0, 0, 0, 0, 0]])
    for later in (first, second):
        np.testing.assert_array_equal(later.positions, batch.positions)
    counts = mtp_counts(jax.tree.map(jnp.asarray, batch), 2)
    assert {name: float(count) for name, count in counts.items()} == {'mtp_1': 11.5, 'mtp_2': 3.0}


def test_a_checkpoint_goes_round_bit_for_bit_with_its_copies(tmp_path):
    model, _ = opened()
    model.export(tmp_path / 'hf')
    stored, written = load_file(MODEL / 'model.safetensors'), load_file(tmp_path / 'hf' / 'model.safetensors')
    assert set(written) == set(stored)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    model.save(tmp_path / 'jpt')
    for directory in ('hf', 'jpt'):
        again = jpt.load(tmp_path / directory)
        assert again.config == model.config
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_copy_that_is_none_is_refused(tmp_path):
    tensors = load_file(MODEL / 'model.safetensors')
    name = 'model.layers.3.shared_head.head.weight'
    tensors[name] = tensors[name] + 1
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r'layers\.3\.shared_head\.head\.weight differs from lm_head\.weight'):
        jpt.load(tmp_path)
    assert jpt.load(tmp_path, mtp=False).config.mtp == ()  # where it does not matter
    # Without any copies, as transformers has them in memory, there is nothing to compare.
    own = {key: value for key, value in tensors.items() if 'shared_head.head' not in key and '.embed_tokens' not in key}
    write(tmp_path, own | {'model.embed_tokens.weight': tensors['model.embed_tokens.weight']})
    jax.tree.map(np.testing.assert_array_equal, jpt.load(tmp_path).params, opened()[0].params)


def write(directory, tensors):
    save_file(tensors, directory / 'model.safetensors', metadata={'format': 'pt'})
    (directory / 'config.json').write_text((MODEL / 'config.json').read_text())


def test_modules_may_be_left_out(tmp_path):
    """By what opens a model, and where a config promises modules of which no tensor is there."""
    model, golden = opened()
    layers = model.config.num_layers
    stored = load_file(MODEL / 'model.safetensors')
    own = {name: t for name, t in stored.items() if not re.match(rf'model\.layers\.[{layers}-9]', name)}
    write(tmp_path, own)
    convert(MODEL, tmp_path / 'converted', 'hf', mtp=False)
    for path, options in ((MODEL, {'mtp': False}), (tmp_path, {}), (tmp_path / 'converted', {})):
        short = jpt.load(path, **options)
        assert short.config.mtp == ()
        assert 'mtp' not in short.params
        np.testing.assert_array_equal(short.logits(golden['tokens']), model.logits(golden['tokens']))
    assert set(load_file(tmp_path / 'converted' / 'model.safetensors')) == set(own)


def test_a_job_without_their_loss_leaves_modules_as_they_are(tmp_path):
    """Not moved, not decayed; with the loss every kernel of theirs moves."""
    source = {'model': {'path': str(MODEL)}, 'batch': {'size': 2, 'length': 16}, 'optimizer': {'weight_decay': 0.5}}
    for weight in (0.0, 0.3):
        job = jobs.make_job(settings(tmp_path, eval={}, mtp_loss=weight, **source), jax.devices()[:1])
        state = jobs.first_state(job)
        before = jax.device_get(jobs.whole_model(job, state))
        row = np.tile(np.arange(16, dtype=np.int32), (2, 1))
        batch = Batch(row, row + 1, np.ones((2, 16), np.float32), row, np.ones((2, 16), np.int32))
        state, sums = job.step(state, jax.device_put(batch, job.batch_shardings))
        after = jax.device_get(jobs.whole_model(job, state))
        assert ('mtp_1' in sums) == (weight > 0)
        assert float(sums['accepted'][0]) == 1
        moved = jax.tree.map(lambda one, other: bool(np.any(one != other)), after['mtp'], before['mtp'])
        kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moved) if path[-1].key == 'kernel']
        assert all(kernels) if weight else not any(jax.tree.leaves(moved))
        assert np.any(after['lm_head']['kernel'] != before['lm_head']['kernel'])


def test_a_loss_of_modules_that_are_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'config\.mtp_loss=0\.3: config\.model has no modules'):
        jobs.make_job(settings(tmp_path, eval={}, mtp_loss=0.3, model={'path': str(MODEL), 'mtp': False}))
    with pytest.raises(ValueError, match=r'mtp_loss=0\.3: expected 0 where lora is given'):
        settings(tmp_path, eval={}, mtp_loss=0.3, model={'path': str(MODEL)}, lora={'rank': 2})
