"""A step with a teacher that reads other tokens: against whole logits of one device, on meshes, and its own tokens."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / 'sharding'))
from sharded_steps import MODELS, make_batch, worst_error

from jpt.data.alignment import TeacherTokens
from jpt.distill.aligned import SharedWords
from jpt.distill.mixture import token_loss
from jpt.distill.objective import logit_distillation
from jpt.distill.settings import DistillConfig
from jpt.kernels.aligned_loss import aligned_distillation
from jpt.kernels.distillation_loss import Teacher
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.sharding.grads import loss_and_grads, loss_and_sums
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings

# Layers of one kind, to compile quickly; norms after, soft caps, tied tables.
STUDENT = dataclasses.replace(MODELS['mixed'], segments=(Segment((LayerKind(Rope(), 4, 24),), 3),))
V, J, U = 53, 12, 6
TEACHER = ModelConfig('llama', 70, 8, 2, 1, 4, (Segment((LayerKind(Rope(), None, 12),), 2),), 64)
SETTINGS = {'alpha': 0.7, 'temperature': 2.0, 'reverse_kl': 0.5}
ULD = 1.3


def words_of(table, likely, uld=ULD):
    divergences = token_loss(DistillConfig(**SETTINGS), (Teacher(),), 'tail')
    lacking = ~np.isin(np.arange(V), table)
    return SharedWords(table, lacking, likely, aligned_distillation(divergences, uld=uld))


def some_words():
    """Thirty words in another order; 40 of the teacher's and 23 of the student's have no partner."""
    random, table = np.random.default_rng(4), np.full(TEACHER.vocab_size, -1, np.int32)
    table[random.permutation(70)[:30]] = random.permutation(V)[:30]
    return words_of(table, J)


def read_again():
    """The batch with rows of six tokens of the teacher, in documents of two and four."""
    random, batch = np.random.default_rng(6), make_batch(V)
    segments = np.tile([1, 1, 2, 2, 2, 2], (8, 1)).astype(np.int32)
    positions = np.tile([0, 1, 0, 1, 2, 3], (8, 1)).astype(np.int32)
    at = np.array([[0, -1, 1, 2, 3, -1, 4, -1], [-1, 0, -1, 2, -1, 4, 5, -1]] * 4, np.int32)
    tokens = random.integers(0, TEACHER.vocab_size, (8, U), dtype=np.int32)
    return batch._replace(teacher=TeacherTokens(tokens, positions, segments, at))


@functools.cache
def weights_of(cfg, seed=1):
    shapes = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape), shapes)


@functools.cache
def whole():
    """(loss, gradients, metrics) in float64 from whole logits, without jpt.sharding and the kernels of the head."""
    words, batch, temperature = some_words(), read_again(), SETTINGS['temperature']
    given, compute = batch.teacher, Compute('float64', attention='dense')

    def logits(cfg, params, read):
        hidden = forward(cfg, params, read.tokens, read.positions, read.segment_ids, compute=compute).hidden_BTD
        return unembed(cfg, params, hidden)

    p_BUV = np.asarray(jax.nn.softmax(jax.jit(functools.partial(logits, TEACHER))(weights_of(TEACHER), given) / 2))
    p = np.take_along_axis(p_BUV, np.maximum(given.at, 0)[..., None], axis=1)
    p = np.where(p >= np.sort(p)[..., -J, None], p, 0)  # the likeliest, of which `tail` are not shared
    on_words, used = np.zeros((8, 8, V)), np.zeros((8, 8, V), bool)
    shared = words.table >= 0
    on_words[..., words.table[shared]], used[..., words.table[shared]] = p[..., shared], p[..., shared] > 0
    tail, alone = 1 - on_words.sum(-1), -np.sort(-np.where(shared, 0, p))[..., :J]
    aligned = given.at >= 0
    weights = batch.loss_mask / batch.loss_mask.sum()

    def loss(params):
        ours = logits(STUDENT, params, batch)
        q = jax.nn.softmax(ours / temperature)
        rest = 1 - jnp.sum(jnp.where(used, q, 0), -1)
        safe_p, safe_q = jnp.where(used, on_words, 1), jnp.where(used, q, 1)
        kl = jnp.sum(safe_p * jnp.log(safe_p / safe_q), -1) + tail * jnp.log(tail / rest)
        reverse = jnp.sum(safe_q * jnp.log(safe_q / safe_p), -1) + rest * jnp.log(rest / tail)
        uld = jnp.sum(jnp.abs(alone + jnp.sort(-jnp.where(words.lacking, q, 0))[..., :J]), -1)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(ours), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        parts = {'kl': kl, 'reverse_kl': reverse, 'uld': uld}
        means = {name: jnp.sum(weights * aligned * x) / np.sum(weights * aligned) for name, x in parts.items()}
        divergence = jnp.where(aligned, kl + 0.5 * reverse + ULD * uld, 0)
        return jnp.sum(weights * (0.7 * temperature**2 * divergence + 0.3 * ce)), means

    (total, means), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights_of(STUDENT))
    means['aligned'] = np.sum(weights * aligned)
    return float(total), jax.tree.map(np.asarray, grads), {name: float(mean) for name, mean in means.items()}


def step(sizes, teacher, weights, words, batch, run=loss_and_grads, **how):
    """What a step gives on as many devices as the mesh has, gradients in the canonical layout."""
    mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: int(np.prod([1, *sizes.values()]))])
    params = weights_of(STUDENT)
    frozen = {'model': jax.tree.map(lambda _: None, params), 'teacher': weights}
    plan = make_plan(mesh, {'model': STUDENT, 'teacher': teacher}, params, frozen, dtype='float64', **how)
    distill = DistillConfig(**SETTINGS)
    objective = logit_distillation(STUDENT, {'teacher': teacher}, Compute('float64'), distill, words=words)
    places = shardings(mesh, (plan.specs, plan.frozen_specs))
    placed = jax.device_put(to_device_layout(plan.layouts['model'], params), places[0])
    frozen = jax.device_put(frozen | {'teacher': to_device_layout(plan.layouts['teacher'], weights)}, places[1])
    batch = jax.device_put(batch, batch_shardings(mesh, batch))
    found = jax.jit(lambda *given: run(objective, *given, plan))(placed, frozen, batch)
    if run is loss_and_sums:
        return found
    total, grads, sums = found
    return float(total), to_canonical_layout(plan.layouts['model'], jax.tree.map(np.asarray, grads)), sums


MESHES = {
    'tensor_fsdp': ({'fsdp': 2, 'tensor': 2}, {'num_microbatches': 2}),
    'pipe_tensor': ({'pipe': 2, 'tensor': 2}, {'num_microbatches': 2}),
    'gpipe': ({'pipe': 2}, {'num_microbatches': 2, 'schedule': 'gpipe'}),
}


@pytest.mark.parametrize('name', MESHES)
def test_loss_gradients_and_means_are_those_of_whole_logits(name):
    sizes, how = MESHES[name]
    with jax.enable_x64(True):
        expected, slopes, means = whole()
        total, grads, sums = step(sizes, TEACHER, weights_of(TEACHER), some_words(), read_again(), **how)
    assert total == pytest.approx(expected, rel=1e-10)
    assert worst_error(grads, slopes) < 1e-9
    for key, value in means.items():
        assert float(sums[key][0] / sums[key][1]) == pytest.approx(value, rel=1e-9), key
    parts = sum(float(sums[key][0] / sums[key][1]) for key in sums if key.endswith('_weighted'))
    assert parts == pytest.approx(float(sums['loss'][0] / sums['loss'][1]), rel=1e-12)


def test_a_teacher_with_the_same_words_and_all_of_them_seen_is_the_usual_one():
    """Every token aligned with itself: no tail, nothing to sort, and the loss from whole logits."""
    with jax.enable_x64(True):
        weights, batch = weights_of(STUDENT, 3), make_batch(V)
        places = np.where(batch.segment_ids > 0, np.arange(8), -1).astype(np.int32)
        own = TeacherTokens(batch.tokens, batch.positions, batch.segment_ids, places)
        words = words_of(np.arange(V, dtype=np.int32), V)
        usual, grads, _ = step({'tensor': 2}, STUDENT, weights, None, batch)
        total, same, sums = step({'tensor': 2}, STUDENT, weights, words, batch._replace(teacher=own))
    assert total == pytest.approx(usual, rel=1e-9)
    assert worst_error(same, grads) < 1e-8
    assert float(sums['aligned'][0] / sums['aligned'][1]) == pytest.approx(1)
    assert float(sums['uld'][0]) == pytest.approx(0, abs=1e-12)


def test_without_any_aligned_token_there_is_cross_entropy_alone():
    with jax.enable_x64(True):
        batch = read_again()
        batch = batch._replace(teacher=batch.teacher._replace(at=np.full_like(batch.teacher.at, -1)))
        sums = step({}, TEACHER, weights_of(TEACHER), some_words(), batch, loss_and_sums)
    assert float(sums['loss'][0]) == pytest.approx(0.3 * float(sums['ce'][0]), rel=1e-9)
    assert [float(x) for x in sums['kl']] == pytest.approx([0, 0], abs=1e-12)
