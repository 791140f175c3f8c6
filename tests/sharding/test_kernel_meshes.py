"""A model whose blocks of 128 x 128 are whole on every shard, so that its products run their kernels there."""

import functools

import jax
import numpy as np
import pytest
from sharded_steps import make_batch, run_step, whole_step, worst_error

from jpt.kernels import local_products
from jpt.models.config import Compute, Experts, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init, unembed
from jpt.quant import gradients as in_eight_bits
from jpt.quant.recipes import chosen, quantized_tree, recipe_of
from jpt.quant.tensors import FakeQuant
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.training.freeze import partition
from jpt.training.objective import language_modeling

DENSE = LayerKind(Rope(), None, 256)
MODELS = {
    'dense': ModelConfig('llama', 54, 128, 4, 2, 128, (Segment((DENSE,), 2),), 64),
    'experts': ModelConfig(
        'qwen3_moe',
        54,
        128,
        4,
        2,
        128,
        (Segment((LayerKind(Rope(), None, None, experts=True),), 2),),
        64,
        experts=Experts(4, 2, 256),
    ),
}


@functools.cache
def quantized(model, fake, gradients='as_they_are'):
    """Parameters float32, the layers' in FP8 blocks; `fake`: to be trained through rounding."""
    params = init(MODELS[model], jax.random.key(0))
    formats = chosen(params, recipe_of([('layers/**', 'fp8_block')]))
    if fake:
        return quantized_tree(
            params, formats, lambda path, weight, form: FakeQuant(weight, format=form, gradients=gradients)
        )
    return jax.jit(lambda params: quantized_tree(params, formats))(params)


@pytest.mark.parametrize(
    ('model', 'mesh', 'microbatches', 'fake'),
    [
        ('dense', MeshConfig(fsdp=2, tensor=2, context=2), 1, False),
        ('dense', MeshConfig(pipe=2, data=2, tensor=2), 2, True),
        ('experts', MeshConfig(expert=2, tensor=2, fsdp=2), 1, True),
    ],
    ids=('sharded', 'pipelined', 'experts'),
)
def test_a_step_with_kernels_on_shards(model, mesh, microbatches, fake, monkeypatch):
    """Up to the codes that the last bits of sums in another order flip: a single one is off by a sixteenth."""
    used = []
    for name in ('block_matmul', 'grouped_block_matmul'):
        real = getattr(local_products, name)
        monkeypatch.setattr(local_products, name, lambda *given, real=real: used.append(given[2].shape) or real(*given))
    cfg, (params, frozen) = MODELS[model], partition(quantized(model, fake), ())
    loss, gradients = whole_step(cfg, params, frozen, 'float32')
    used.clear()
    objective = language_modeling(cfg, Compute())
    step = run_step(cfg, objective, params, frozen, mesh, 'float32', num_microbatches=microbatches)
    np.testing.assert_allclose(step.total, loss, rtol=1e-4)
    assert worst_error(step.grads, gradients) < 2e-3
    # Every product is one of a shard's own part of a weight: half of its heads, of its MLP's width, of its experts.
    attention = {(256, 128), (128, 128), (128, 256)}
    mlp = {(128, 128)} if model == 'dense' else {(2, 128, 128)}
    assert set(used) == attention | mlp


def test_gradients_of_experts_by_kernels(monkeypatch):
    """What Hopper's kernels would multiply, by their references, against products of the numbers on the same mesh."""
    cfg, (params, frozen) = MODELS['experts'], partition(quantized('experts', True, 'block'), ())
    mesh, objective = MeshConfig(expert=2, tensor=2, fsdp=2), language_modeling(cfg, Compute())
    plain = run_step(cfg, objective, params, frozen, mesh, 'float32')
    used, product = [], in_eight_bits.group_block_product
    monkeypatch.setattr(
        in_eight_bits,
        'group_block_product',
        lambda *given: used.append((given[0].shape, given[2].shape)) or product(*given),
    )
    monkeypatch.setattr(in_eight_bits, 'reason_not_hopper', lambda: None)
    found = run_step(cfg, objective, params, frozen, mesh, 'float32')
    np.testing.assert_allclose(found.total, plain.total, rtol=1e-5)
    assert worst_error(found.grads, plain.grads) < 2e-3
    # Outputs and inputs that a shard has of gate, up and down, by the rows of its experts in whole runs.
    assert {rows % 128 for sides in used for _, rows in sides} == {0}
    assert {(outs, ins) for (outs, _), (ins, _) in used} == {(128, 128)}


@pytest.mark.parametrize(
    ('model', 'sizes'),
    [('dense', {'tensor': 2, 'data': 4}), ('experts', {'tensor': 2, 'fsdp': 2, 'expert': 2})],
    ids=('dense', 'experts'),
)
def test_logits_without_a_plan(model, sizes):
    """As generation and evaluation run: all axes automatic."""
    cfg, batch, params = MODELS[model], make_batch(54, np.float32), quantized(model, False)
    inputs = batch.tokens, batch.positions, batch.segment_ids
    run = jax.jit(lambda params, inputs: unembed(cfg, params, forward(cfg, params, *inputs).hidden_BTD))
    alone = run(params, inputs)
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        found = run(params, inputs)
    real = batch.segment_ids > 0
    assert np.linalg.norm((found - alone)[real]) < 1e-3 * np.linalg.norm(alone[real])
