"""Student and teachers side by side on a mesh, against whole logits on one device, and against the student itself."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_steps import MODELS, canonical_params, make_batch, worst_error

from jpt.distill.objective import logit_distillation
from jpt.distill.settings import DistillConfig, MixtureSchedule
from jpt.kernels.divergences import NAMES
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.sharding.grads import loss_and_grads
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings
from jpt.training.objective import language_modeling


class Job(NamedTuple):
    """Teachers with their shares, what is minimized, and the weights that then hold, written out."""

    words: dict[str, int]  # of each teacher
    shares: tuple[float, ...]
    distill: DistillConfig
    step: int
    weights: dict[str, float]  # alpha among them


JOBS = {
    'one teacher': Job(
        {'teacher': 53},
        (1.0,),
        DistillConfig(forward_kl=0.6, reverse_kl=0.2, jsd=0.5, beta=0.3, temperature=2.0, alpha=0.7),
        0,
        {'forward_kl': 0.6, 'reverse_kl': 0.2, 'jsd': 0.5, 'alpha': 0.7},
    ),
    # Three quarters of the way; one teacher has fewer words than the student and one has more.
    'two teachers and a schedule': Job(
        {'small': 47, 'large': 61},
        (0.25, 0.75),
        DistillConfig(
            jsd=0.5,
            beta=0.3,
            temperature=2.0,
            alpha=0.9,
            schedule=MixtureSchedule({'forward_kl': 0.2, 'reverse_kl': 0.4, 'alpha': 0.5}, end=110, begin=10),
        ),
        85,
        {'forward_kl': 0.4, 'reverse_kl': 0.3, 'jsd': 0.5, 'alpha': 0.6},
    ),
}


def teacher_of(words):
    return ModelConfig('llama', words, 8, 2, 1, 4, (Segment((LayerKind(Rope(), None, 12),), 3),), 64)


def random_weights(cfg, seed):
    shapes = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape), shapes)


def wanted(job, batch, teachers):
    """Loss and gradients from whole logits on one device."""
    student, weights = MODELS['mixed'], job.weights

    def logits(cfg, params):
        inputs = batch.tokens, batch.positions, batch.segment_ids
        hidden = forward(cfg, params, *inputs, compute=Compute('float64', attention='dense')).hidden_BTD
        return unembed(cfg, params, hidden)

    def mixed(theirs, ours):
        words = min(theirs.shape[-1], ours.shape[-1])
        theirs, ours = (jax.nn.log_softmax(x[..., :words] / 2) for x in (theirs, ours))
        p, q = jnp.exp(theirs), jnp.exp(ours)
        middle = jnp.log(0.3 * p + 0.7 * q)
        each = weights['forward_kl'] * p * (theirs - ours) + weights['reverse_kl'] * q * (ours - theirs)
        each += weights['jsd'] * (0.3 * p * (theirs - middle) + 0.7 * q * (ours - middle))
        return jnp.sum(each, axis=-1)

    def loss(params):
        ours = logits(student, params)
        values = [mixed(logits(teacher_of(job.words[name]), teachers[name]), ours) for name in job.words]
        divergence = sum(share * value for share, value in zip(job.shares, values, strict=True))
        ce = -jnp.take_along_axis(jax.nn.log_softmax(ours), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        each = weights['alpha'] * 4 * divergence + (1 - weights['alpha']) * ce
        return jnp.sum(each * batch.loss_mask) / jnp.sum(batch.loss_mask)

    return jax.jit(jax.value_and_grad(loss))(canonical_params('mixed'))


@pytest.mark.parametrize('name', JOBS)
def test_loss_and_gradients_are_those_of_whole_logits(name):
    """Teachers of another depth and width, on two stages, rows and words divided."""
    job = JOBS[name]
    with jax.enable_x64(True):
        student = MODELS['mixed']
        batch = make_batch(47)
        configs = {teacher: teacher_of(words) for teacher, words in job.words.items()}
        teachers = {teacher: random_weights(cfg, seed) for seed, (teacher, cfg) in enumerate(configs.items())}
        total, grads = wanted(job, batch, teachers)

        mesh = make_mesh(MeshConfig(pipe=2, data=1, fsdp=2, tensor=2))
        params = canonical_params('mixed')
        frozen = {'model': jax.tree.map(lambda _: None, params), **teachers}
        plan = make_plan(mesh, {'model': student, **configs}, params, frozen, num_microbatches=4, dtype='float64')
        objective = logit_distillation(student, configs, Compute('float64'), job.distill, shares=job.shares)
        places = shardings(mesh, (plan.specs, plan.frozen_specs))
        params = jax.device_put(to_device_layout(plan.layouts['model'], params), places[0])
        laid_out = {name: to_device_layout(plan.layouts[name], tree) for name, tree in teachers.items()}
        frozen = jax.device_put(frozen | laid_out, places[1])
        placed = jax.device_put(batch, batch_shardings(mesh, batch))
        run = jax.jit(lambda *arguments: loss_and_grads(objective, *arguments, plan, job.step))
        found, found_grads, sums = run(params, frozen, placed)
        assert float(found) == pytest.approx(float(total), rel=1e-10)
        home = to_canonical_layout(plan.layouts['model'], jax.tree.map(np.asarray, found_grads))
        assert worst_error(home, jax.tree.map(np.asarray, grads)) < 1e-10
        means = {key: float(value / count) for key, (value, count) in sums.items()}
        parts = sum(means[key] for key in means if key.endswith('_weighted'))
        assert parts == pytest.approx(means['loss'], rel=1e-12)
        if len(job.words) > 1:
            assert [means[f'share/{teacher}'] for teacher in job.words] == pytest.approx(job.shares)
            mean = sum(share * means[f'kl/{teacher}'] for share, teacher in zip(job.shares, job.words, strict=True))
            assert means['kl'] == pytest.approx(mean, rel=1e-12)


ALIKE = [
    ({'data': 2, 'context': 2, 'tensor': 2}, {}),
    ({'fsdp': 4, 'tensor': 2}, {}),
    ({'pipe': 2, 'fsdp': 2, 'tensor': 2}, {'num_microbatches': 2}),
    ({'pipe': 2, 'data': 2}, {'num_microbatches': 4, 'chunks': 2}),
    ({'pipe': 2, 'data': 2}, {'num_microbatches': 2, 'schedule': 'gpipe'}),
]
# The total variation has a kink where both are equal: its value counts, and its gradient for nothing.
EVERY = dict.fromkeys(NAMES, 1.0) | {'total_variation': 1e-30}


def narrow(tree):
    return jax.tree.map(np.float32, tree)


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))


@functools.cache
def gradient_of_labels():
    """The norm of the gradient of the cross-entropy, on one device."""
    params, mesh = narrow(canonical_params('mixed')), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    frozen = {'model': jax.tree.map(lambda _: None, params)}
    plan = make_plan(mesh, {'model': MODELS['mixed']}, params, frozen)
    objective = language_modeling(MODELS['mixed'], Compute())
    batch = make_batch(53, np.float32)
    return norm(jax.jit(lambda params: loss_and_grads(objective, params, frozen, batch, plan)[1])(params))


@pytest.mark.parametrize(('sizes', 'how'), ALIKE)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(sizes, how):
    """In float32: every divergence is at most 1e-6 and the gradient of all at most 1e-5 of the cross-entropy's."""
    cfg, params = MODELS['mixed'], narrow(canonical_params('mixed'))
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = make_mesh(MeshConfig(**{'data': 1, **sizes}), devices)
    frozen = {'model': jax.tree.map(lambda _: None, params), 'teacher': params}
    plan = make_plan(mesh, {'model': cfg, 'teacher': cfg}, params, frozen, **how)
    objective = logit_distillation(cfg, {'teacher': cfg}, Compute(), DistillConfig(**EVERY))
    places = shardings(mesh, (plan.specs, plan.frozen_specs))
    placed = jax.device_put(to_device_layout(plan.layouts['model'], params), places[0])
    frozen = jax.device_put(frozen | {'teacher': to_device_layout(plan.layouts['teacher'], params)}, places[1])
    batch = make_batch(53, np.float32)
    run = jax.jit(lambda *arguments: loss_and_grads(objective, *arguments, plan))
    total, grads, sums = run(placed, frozen, jax.device_put(batch, batch_shardings(mesh, batch)))
    assert abs(float(total)) <= 1e-6
    for name in ('kl', *NAMES[1:]):
        assert abs(float(sums[name][0] / sums[name][1])) <= 1e-6, name
    assert norm(grads) <= 1e-5 * gradient_of_labels()
    assert float(sums['agreement'][0] / sums['agreement'][1]) == pytest.approx(1)
