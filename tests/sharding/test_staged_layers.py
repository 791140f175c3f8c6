"""Layers divided over `pipe` outside of training: what a model computes, its gradients and its statistics stay."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded_steps import MODELS, canonical_params, make_batch, worst_error

from jpt.kernels.staged_scan import staged_scan
from jpt.models.calibration import calibrate
from jpt.models.transformer import forward
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, units_of

ROWS = 56  # of the vocabulary of 53 with what two stages and two shards of tensor need


def padded(model):
    """The parameters in float32, the tied table with rows added."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), canonical_params(model))
    table = params['embed']['embedding']
    return params | {'embed': {'embedding': jnp.pad(table, ((0, ROWS - len(table)), (0, 0)))}}


def test_layers_of_a_model_stay_with_their_stages():
    """Seven layers: two periods of three, one to a stage, and one layer that every device has."""
    cfg, batch = MODELS['mixed'], make_batch(MODELS['mixed'].vocab_size, 'float32')
    devices, params = make_mesh(MeshConfig(pipe=2, data=2, tensor=2)), padded('mixed')

    @jax.jit
    def both(params, batch):
        def loss(params):
            hidden = forward(cfg, params, batch.tokens, batch.positions, batch.segment_ids).hidden_BTD
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.grad(loss, has_aux=True)(params)

    wanted = both(params, batch), calibrate(cfg, params, [batch])
    placed = jax.device_put(params, shardings(devices, param_specs(params, Rules(devices.shape, units_of(cfg)))))
    kernel = placed['layers'][0][0]['mlp']['up']['kernel']
    assert kernel.sharding.spec == P('pipe', 'tensor', None)
    assert placed['layers'][1][0]['mlp']['up']['kernel'].sharding.spec == P(None, 'tensor', None)
    batch = jax.device_put(batch, batch_shardings(devices, batch))
    with jax.set_mesh(devices):
        found = both(placed, batch), calibrate(cfg, placed, [batch])
        text = both.lower(placed, batch).compile().as_text()
    assert not re.search(r' all-gather(-start)?\(', text), 'a weight that is not of the stage'
    assert worst_error(found, wanted) < 1e-4


@pytest.mark.parametrize('repeats', [8, 6])
def test_what_is_stacked_up_is_in_order(repeats):
    """As lax.scan has it, whether four stages divide the steps or not."""
    devices = make_mesh(MeshConfig(pipe=4, data=2))

    def body(carry, step):
        return {'sum': carry['sum'] * 0.5 + step}, carry['sum'] - step

    steps, carry = jnp.arange(1.0, repeats + 1), {'sum': jnp.float32(3)}
    wanted = jax.lax.scan(body, carry, steps)
    with jax.set_mesh(devices):
        found = jax.jit(lambda carry, steps: staged_scan(body, carry, steps))(carry, steps)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)
