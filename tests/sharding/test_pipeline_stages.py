"""What a pipeline costs: which work is really run, and what memory it needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.data.batch import Batch
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.token_losses import cross_entropy
from jpt.kernels.vocab import embed_lookup
from jpt.models.config import LayerKind, ModelConfig, Segment
from jpt.sharding.grads import loss_and_grads, loss_and_sums
from jpt.sharding.layout import to_device_layout
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.plan import make_plan
from jpt.sharding.rules import shardings
from jpt.sharding.timetable import waste
from jpt.training.objective import token_counts, token_weights

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

    return Functions(lambda batch, step: token_counts(batch), first, stage, last)


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
