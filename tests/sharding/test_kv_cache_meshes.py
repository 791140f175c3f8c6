"""Keys and values in eight bits on meshes: the loss and the gradients of one device; text of a divided cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_steps import MODELS, canonical_params, make_batch, run_step, whole_loss, whole_step, worst_error

from jpt.model import Model
from jpt.models.config import Compute
from jpt.models.transformer import forward, unembed
from jpt.sharding.layout import make_layout, to_device_layout
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, units_of
from jpt.training.freeze import merge, partition
from jpt.training.objective import language_modeling

CFG = dataclasses.replace(MODELS['mixed'], kv_cache='fp8')


@functools.cache
def parameters():
    """Those of the model, and scales of its own for every layer, (trainable, frozen) in float64 but for the scales."""
    params = jax.tree.map(np.asarray, canonical_params('mixed'))
    drawn = np.random.default_rng(4)

    def layer(kind):
        repeats = len(kind['attn']['q']['kernel'])
        scales = {name: drawn.uniform(0.01, 0.03, repeats).astype(np.float32) for name in ('k_scale', 'v_scale')}
        return kind | {'attn': kind['attn'] | scales}

    layers = [[layer(kind) for kind in kinds] for kinds in params['layers']]
    return partition(params | {'layers': layers}, ())


@functools.cache
def wanted():
    """Loss and gradients of one device, without jpt.sharding; the loss where keys and values are not rounded."""
    with jax.enable_x64(True):
        plain = jax.jit(lambda params: whole_loss(MODELS['mixed'], params, make_batch(CFG.vocab_size))[0])
        return *whole_step(CFG, *parameters()), float(plain(merge(*parameters())))


@pytest.mark.parametrize(
    ('mesh', 'microbatches'),
    [(MeshConfig(fsdp=2, tensor=2, context=2), 1), (MeshConfig(pipe=2, data=2, tensor=2), 2)],
    ids=('sharded', 'pipelined'),
)
def test_loss_and_gradients(mesh, microbatches):
    loss, gradients, plain = wanted()
    assert abs(loss - plain) > 1e-4  # rounding does something
    params, rest = parameters()
    assert len(jax.tree.leaves(rest)) == 2 * len(CFG.segments[0].kinds) + 2  # the scales alone, of both segments
    objective = language_modeling(CFG, Compute('float64'))
    with jax.enable_x64(True):
        step = run_step(CFG, objective, params, rest, mesh, 'float64', num_microbatches=microbatches)
    np.testing.assert_allclose(step.total, loss, rtol=1e-7)
    assert worst_error(step.grads, gradients) < 1e-5


def test_a_divided_cache_gives_the_text_of_one_device():
    """Rows over data, heads of keys and values over tensor. Greedy, from ragged prompts, beside whole passes."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), merge(*parameters()))
    model = Model(CFG, params)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3], [2, 3, 8, 4]]
    rows = [list(prompt) for prompt in prompts]
    logits = jax.jit(lambda tokens: unembed(CFG, params, forward(CFG, params, tokens).hidden_BTD))
    for _ in range(6):
        for row in rows:
            padded = np.zeros((1, 16), np.int32)  # what follows is not seen
            padded[0, : len(row)] = row
            row.append(int(np.argmax(np.asarray(logits(padded))[0, len(row) - 1])))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = to_device_layout(make_layout(params, mesh.shape), params)
    specs = param_specs(placed, Rules(mesh.shape, units_of(CFG)))
    divided = dataclasses.replace(model, mesh=mesh, params=jax.device_put(placed, shardings(mesh, specs)))
    for one in (model, divided):
        results = one.generate(prompts, max_new_tokens=6, temperature=0.0)
        assert [[*result.prompt_ids, *result.token_ids] for result in results] == rows
