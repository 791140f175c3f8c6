"""What a pipeline costs: which work is really run, and what memory it needs; and what it carries."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_steps import MODELS, canonical_params, make_batch, worst_error

from jpt.data.batch import Batch
from jpt.distill.objective import logit_distillation
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import cross_entropy
from jpt.kernels.vocab import embed_lookup
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.sharding.grads import loss_and_grads, loss_and_sums
from jpt.sharding.layout import to_canonical_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings
from jpt.sharding.timetable import waste
from jpt.training.objective import token_counts, token_weights
from jpt.training.settings import DistillConfig

WIDTH, VOCAB, LAYERS, LENGTH = 16, 24, 8, 8
SHAPES = ModelConfig('llama', VOCAB, WIDTH, 1, 1, 4, (Segment((LayerKind(mlp_width=32),), LAYERS),), 8)


class Functions(NamedTuple):
    counts: object
    first: object
    stage: object
    last: object
    reads_load: bool = False


def toy(on_stage=lambda: None):
    """Tables, and layers h + W2 tanh(W1 h); `on_stage` is called on the host for every layer that a device runs."""

    def first(ends, frozen, micro):
        return embed_lookup(ends['embed']['embedding'], micro.tokens)

    def stage(layers, frozen, hidden, micro):
        def layer(hidden, params):
            jax.debug.callback(on_stage)
            inner = jnp.tanh(hidden @ params[0]['mlp']['up']['kernel'].T)
            return hidden + inner @ params[0]['mlp']['down']['kernel'].T, None

        return jax.lax.scan(layer, hidden, layers.layers[0])[0]

    def last(ends, frozen, hidden, micro, counts):
        weights, targets = token_weights(micro, counts), {'targets': micro.targets}
        return linear_loss(hidden, ends['lm_head']['kernel'], weights, targets, cross_entropy(), vocab_size=VOCAB)

    return Functions(token_counts, first, stage, last)


def toy_params():
    random = np.random.default_rng(0)
    mlp = {'up': {'kernel': (LAYERS, 32, WIDTH)}, 'down': {'kernel': (LAYERS, WIDTH, 32)}}
    table = (VOCAB, WIDTH)
    shapes = {'embed': {'embedding': table}, 'layers': [[{'mlp': mlp}]], 'lm_head': {'kernel': table}}

    def draw(shape):
        return 0.2 * random.normal(size=shape).astype(np.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def toy_step(microbatches, schedule='1f1b', chunks=1, on_stage=lambda: None):
    """(compiled step, its arguments) on four stages, two rows per microbatch."""
    mesh = make_mesh(MeshConfig(pipe=4, data=1), jax.devices()[:4])
    params = toy_params()
    none = {'model': jax.tree.map(lambda _: None, params)}
    plan = make_plan(
        mesh, {'model': SHAPES}, params, none, num_microbatches=microbatches, chunks=chunks, schedule=schedule
    )
    random = np.random.default_rng(1)
    tokens, targets = random.integers(0, VOCAB, (2, 2 * microbatches, LENGTH), dtype=np.int32)
    ones = np.ones_like(tokens)
    batch = Batch(tokens, targets, ones.astype(np.float32), ones, ones)
    placed = jax.device_put(to_device_layout(plan.layouts['model'], params), shardings(mesh, plan.specs))
    batch = jax.device_put(batch, batch_shardings(mesh, batch))
    run = jax.jit(lambda params, batch: loss_and_grads(toy(on_stage), params, none, batch, plan))
    return run.lower(placed, batch).compile(), (placed, batch)


def test_devices_in_the_bubble_do_nothing():
    """Layers that are really run, counted on the host: forward once and recomputed once, no matter the bubble."""
    calls = []
    run, arguments = toy_step(6, chunks=2, on_stage=lambda: calls.append(1))
    jax.block_until_ready(run(*arguments))
    jax.effects_barrier()
    layers_per_chunk, report = LAYERS // 8, waste(4, 2, 6)
    assert len(calls) == 2 * 6 * LAYERS
    assert len(calls) == 4 * report.busy * layers_per_chunk
    ungated = 2 * report.ticks * 4 * layers_per_chunk
    assert len(calls) / ungated == pytest.approx(1 - report.lockstep_idle)


def test_memory_of_1f1b_does_not_grow_with_microbatches_and_that_of_gpipe_does():
    few, many = (toy_step(count)[0].memory_analysis().temp_size_in_bytes for count in (8, 64))
    gpipe = toy_step(64, 'gpipe')[0].memory_analysis().temp_size_in_bytes
    integers = 4 * 5 * 2 * LENGTH * (64 - 8)  # the batch itself, reshaped
    assert many <= few + integers
    assert gpipe > 3 * many


TEACHER = ModelConfig('llama', 53, 8, 2, 1, 4, (Segment((LayerKind(Rope(), None, 12),), 3),), 64)


def test_a_teacher_of_another_depth_rides_along():
    """A mixture from whole logits on one device, against a student and a teacher on two stages."""
    with jax.enable_x64(True):
        student, batch = MODELS['mixed'], make_batch(53)
        compute = Compute('float64')
        shapes = jax.eval_shape(functools.partial(init, TEACHER), jax.random.key(0))
        random = np.random.default_rng(3)
        teacher = jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape), shapes)

        def logp(cfg, params, temperature):
            inputs = batch.tokens, batch.positions, batch.segment_ids
            hidden = forward(cfg, params, *inputs, compute=Compute('float64', attention='dense')).hidden_BTD
            return jax.nn.log_softmax(unembed(cfg, params, hidden) / temperature)

        def loss(params):
            ours, theirs = logp(student, params, 2.0), logp(TEACHER, teacher, 2.0)
            p, q = jnp.exp(theirs), jnp.exp(ours)
            middle = jnp.log(0.3 * p + 0.7 * q)
            kl = jnp.sum(0.6 * p * (theirs - ours) + 0.2 * q * (ours - theirs), axis=-1)
            kl += 0.5 * jnp.sum(0.3 * p * (theirs - middle) + 0.7 * q * (ours - middle), axis=-1)
            targets = jnp.asarray(batch.targets)[..., None]
            ce = -jnp.take_along_axis(logp(student, params, 1.0), targets, -1)[..., 0]
            return jnp.sum((0.7 * 4 * kl + 0.3 * ce) * batch.loss_mask) / jnp.sum(batch.loss_mask)

        wanted, wanted_grads = jax.jit(jax.value_and_grad(loss))(canonical_params('mixed'))

        mesh = make_mesh(MeshConfig(pipe=2, data=1, fsdp=2, tensor=2))
        params = canonical_params('mixed')
        frozen = {'model': jax.tree.map(lambda _: None, params), 'teacher': teacher}
        configs = {'model': student, 'teacher': TEACHER}
        distill = DistillConfig(forward_kl=0.6, reverse_kl=0.2, jsd=0.5, beta=0.3, temperature=2.0, alpha=0.7)
        plan = make_plan(mesh, configs, params, frozen, num_microbatches=4, dtype='float64')
        objective = logit_distillation(student, TEACHER, compute, distill)
        places = shardings(mesh, (plan.specs, plan.frozen_specs))
        params = jax.device_put(to_device_layout(plan.layouts['model'], params), places[0])
        teacher_placed = to_device_layout(plan.layouts['teacher'], teacher)
        frozen = jax.device_put(frozen | {'teacher': teacher_placed}, places[1])
        placed = jax.device_put(batch, batch_shardings(mesh, batch))
        run = jax.jit(lambda *arguments: loss_and_grads(objective, *arguments, plan))
        total, grads, _ = run(params, frozen, placed)
        assert float(total) == pytest.approx(float(wanted), rel=1e-10)
        home = to_canonical_layout(plan.layouts['model'], jax.tree.map(np.asarray, grads))
        assert worst_error(home, jax.tree.map(np.asarray, wanted_grads)) < 1e-10


def test_metrics_without_gradients_are_those_of_the_step():
    """The forward half of the timetable, with interleaved stages."""
    run, (params, batch) = toy_step(6, chunks=2)
    total, _, _ = run(params, batch)
    none = {'model': jax.tree.map(lambda _: None, toy_params())}
    mesh = make_mesh(MeshConfig(pipe=4, data=1), jax.devices()[:4])
    plan = make_plan(mesh, {'model': SHAPES}, toy_params(), none, num_microbatches=6, chunks=2)
    sums = jax.jit(lambda params, batch: loss_and_sums(toy(), params, none, batch, plan))(params, batch)
    np.testing.assert_allclose(float(sums['loss'][0]), float(total), rtol=1e-6)
    np.testing.assert_allclose(float(sums['loss'][1]), 1.0, rtol=1e-6)
