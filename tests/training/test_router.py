"""Corrections that even out the load of experts: by hand, in a job's step, and through stop, resume and export."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import settings

from jpt.data.batch import Batch
from jpt.model import load
from jpt.models.config import Compute, Experts, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init
from jpt.sharding.layout import make_layout, to_canonical_layout, to_device_layout
from jpt.training import job as jobs
from jpt.training.router import make_correction, split_load
from jpt.training.run import train_model
from jpt.training.settings import RouterConfig

DENSE = LayerKind(Rope(), None, 12)
SPARSE = dataclasses.replace(DENSE, experts=True)
# Layers: dense, sparse, dense, sparse, sparse, sparse, sparse.
CFG = ModelConfig(
    'deepseek_v3',
    32,
    8,
    2,
    1,
    4,
    (Segment((DENSE, SPARSE), 2), Segment((SPARSE,), 3)),
    16,
    experts=Experts(4, 2, 6, 'sigmoid', corrected=True),
)
LOADS = np.array(
    [[0, 0, 0, 0], [4, 4, 4, 4], [0, 0, 0, 0], [9, 1, 3, 3], [0, 16, 0, 0], [4, 4, 3, 5], [1, 2, 6, 7]], np.float32
)
MOVES = np.sign(LOADS.mean(axis=1, keepdims=True) - LOADS)


def test_the_busiest_expert_is_a_metric_and_the_load_is_not():
    """Layers 1 and 3 to 6 have tokens: the busiest experts have 1, 2.25, 4, 1.25 and 1.75 even shares."""
    rest, load = split_load({'loss': (jnp.ones(()), jnp.ones(())), 'load': (jnp.asarray(LOADS), jnp.ones(()))})
    np.testing.assert_array_equal(load, LOADS)
    assert set(rest) == {'loss', 'max_load'}
    total, count = rest['max_load']
    assert float(count) == 5
    assert float(total) == pytest.approx(1 + 2.25 + 4 + 1.25 + 1.75)
    dense = {'loss': (jnp.ones(()), jnp.ones(()))}
    assert split_load(dense) == (dense, None)


@pytest.fixture(scope='module')
def params():
    """Zeros, and corrections of 0.5 and 1."""
    drawn = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: init(CFG, jax.random.key(0)))
    )
    for value, (segment, kind) in ((0.5, (0, 1)), (1.0, (1, 0))):
        drawn['layers'][segment][kind]['mlp']['router']['correction'] += np.float32(value)
    return drawn


def corrections(tree):
    return [np.asarray(tree['layers'][s][k]['mlp']['router']['correction']) for s, k in ((0, 1), (1, 0))]


@pytest.mark.parametrize(('pipe', 'chunks'), [(1, 1), (2, 1), (3, 2)])
def test_corrections_move_by_the_rate_against_the_load(params, pipe, chunks):
    """On stages of 4 and 3, and of 2, 1, 1, 1, 1 and 1 layers; nothing else moves, an even load moves nothing."""
    layout = make_layout(params, {'pipe': pipe, 'tensor': 1}, chunks)
    placed = to_device_layout(layout, params)
    moved = to_canonical_layout(layout, make_correction(CFG, layout, 0.25)(placed, jnp.asarray(LOADS)))
    first, second = corrections(moved)
    np.testing.assert_array_equal(first, 0.5 + 0.25 * MOVES[[1, 3]])
    np.testing.assert_array_equal(second, 1.0 + 0.25 * MOVES[[4, 5, 6]])
    np.testing.assert_array_equal(first[0], 0.5)
    np.testing.assert_array_equal(second[0], [1.25, 0.75, 1.25, 1.25])
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        if 'correction' not in jax.tree_util.keystr(path):
            before = dict(jax.tree_util.tree_leaves_with_path(params))[path]
            np.testing.assert_array_equal(leaf, before, err_msg=jax.tree_util.keystr(path))


def test_frozen_corrections_stay(params):
    frozen = jax.tree.map(lambda leaf: leaf, params)
    frozen['layers'][0][1]['mlp']['router']['correction'] = None
    frozen['layers'][1][0]['mlp'] = None  # all of it
    moved = make_correction(CFG, make_layout(params, {'pipe': 1, 'tensor': 1}), 0.25)(frozen, jnp.asarray(LOADS))
    assert jax.tree.structure(moved) == jax.tree.structure(frozen)
    assert all(one is other for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(frozen), strict=True))


@pytest.mark.parametrize('field', ['balance_loss', 'z_loss', 'correction_rate', 'capacity'])
def test_settings_that_mean_nothing_are_refused(field):
    with pytest.raises(ValueError, match=f'RouterConfig.{field}=-1'):
        RouterConfig(**{field: -1.0})


ARCHITECTURE = {
    'model_type': 'deepseek_v3',
    'vocab_size': 4096,
    'hidden_size': 16,
    'intermediate_size': 24,
    'moe_intermediate_size': 8,
    'num_hidden_layers': 2,
    'first_k_dense_replace': 1,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'n_routed_experts': 8,
    'num_experts_per_tok': 2,
    'n_group': 4,
    'topk_group': 2,
    'n_shared_experts': 1,
    'q_lora_rank': 12,
    'kv_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 8,
    'max_position_embeddings': 64,
    'tie_word_embeddings': False,
}
RATE = 0.01
MOE = {'model': {'architecture': ARCHITECTURE}, 'batch': {'size': 8, 'length': 16, 'microbatches': 2}}
MOE |= {'router': {'correction_rate': RATE, 'balance_loss': 0.01, 'z_loss': 0.001}}
PIPED = {'mesh': {'pipe': 2, 'data': 2, 'expert': 2}}
NUMBERS = ('balance', 'router_z', 'max_load', 'dropped', 'late')


def random_batch():
    random = np.random.default_rng(3)
    segments = np.tile(np.repeat([1, 2, 0], [9, 5, 2]), (8, 1)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(9), np.arange(5), np.zeros(2)]), (8, 1)).astype(np.int32)
    tokens, targets = random.integers(0, 4096, (2, 8, 16), dtype=np.int32)
    return Batch(tokens, targets, (segments > 0).astype(np.float32), positions, segments)


def correction(model):
    """That of the only layer with experts, wherever it is in the tree."""
    found = [v for path, v in jax.tree_util.tree_leaves_with_path(model) if 'correction' in jax.tree_util.keystr(path)]
    assert [leaf.shape for leaf in found] == [(1, 8)]
    return np.asarray(found[0][0])


def test_a_step_moves_corrections_against_the_load_it_saw(tmp_path):
    """On a pipeline with divided experts, twice; then a batch whose loss is not a number moves nothing."""
    job = jobs.make_job(settings(tmp_path, eval={}, **MOE, **PIPED))
    cfg, batch = job.models['model'].cfg, random_batch()
    tokens = np.sum(batch.segment_ids > 0)
    placed, state = jax.device_put(batch, job.batch_shardings), jobs.first_state(job)
    model = jax.device_get(jobs.whole_model(job, state))

    @jax.jit
    def plain(model, batch):
        """The router's sums of one device."""
        compute = Compute(attention='dense')
        return forward(cfg, model, batch.tokens, batch.positions, batch.segment_ids, compute=compute).router

    for number in (1, 2):
        router = plain(model, batch)
        load_E, before = np.asarray(router.load)[1], correction(model)
        assert load_E.sum() == cfg.experts.per_token * tokens
        assert not np.any(np.asarray(router.load)[0])
        state, sums = job.step(state, placed)
        model = jax.device_get(jobs.whole_model(job, state))
        moves = np.float32(RATE) * np.sign(load_E.mean() - load_E)
        np.testing.assert_array_equal(correction(model), before + moves)  # to the bit: nothing decays it
        assert np.unique(correction(model)).size > 1
        means = {name: float(total) / float(count) for name, (total, count) in jax.device_get(sums).items()}
        assert set(NUMBERS) <= set(means) - {'load'}
        assert means['accepted'] == 1, number
        assert means['dropped'] == 0
        assert 0 <= means['late'] < 1
        assert means['max_load'] == pytest.approx(load_E.max() / load_E.mean(), rel=1e-6)
        assert means['balance'] == pytest.approx(float(router.balance) / tokens, rel=1e-5)
        assert means['router_z'] == pytest.approx(float(router.z) / tokens, rel=1e-5)

    nothing = batch._replace(loss_mask=batch.loss_mask * np.nan)
    state, sums = job.step(state, jax.device_put(nothing, job.batch_shardings))
    assert float(sums['accepted'][0]) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(jobs.whole_model(job, state)), model)


def test_a_rate_of_0_leaves_corrections_to_the_optimizer(tmp_path, monkeypatch):
    """Which leaves them alone, see above."""
    given = []
    monkeypatch.setattr(jobs, 'make_step', lambda *args: given.append(args[-1]) or abs)
    for rate in (0.0, RATE):
        jobs.make_job(settings(tmp_path, eval={}, **MOE | {'router': {'correction_rate': rate}}), jax.devices()[:1])
    assert given[0] is None
    assert given[1] is not None


def rows(workdir):
    """{step: what was measured} from metrics.jsonl, without what depends on clocks."""
    found = {}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines():
        row = json.loads(line)
        timed = ('seconds', 'tokens_per_second', 'memory', 'eta', 'mfu')
        found.setdefault(row['step'], {}).update({k: v for k, v in row.items() if not k.startswith(timed)})
    return found


def test_a_run_with_experts_goes_on_bit_for_bit_and_exports(tmp_path):
    changes = MOE | {'mesh': {'data': 4, 'expert': 2}, 'steps': 4, 'checkpoint': {'every': 2, 'export': True}}
    config = settings(tmp_path, **changes | {'batch': {'size': 8, 'length': 16}})
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    model = train_model(config, whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / 'checkpoints' / '4')  # as if it had ended before that was saved
    resumed = train_model(config, parts)
    assert rows(parts) == rows(whole)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(model.params))

    last = rows(whole)[4]
    assert all(np.isfinite(last[name]) for name in (*NUMBERS, *(f'eval_{name}' for name in NUMBERS)))
    moved = correction(model.params) / RATE
    # Every step moved it by the rate, or not at all where a load was even.
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-4)
    assert 0 < np.abs(moved).max() < 4.001

    exported = load(whole / 'model')
    assert exported.config == model.config
    tokens = np.arange(12).reshape(1, 12)
    np.testing.assert_allclose(exported.logits(tokens), model.logits(tokens), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported.params), jax.device_get(model.params))
