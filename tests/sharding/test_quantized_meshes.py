"""Quantized weights on meshes: the same codes and scales bit by bit, the same loss and gradients of what is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_steps import MODELS, canonical_params, make_batch, run_step, whole_step, worst_error

from jpt.models.config import Compute
from jpt.models.transformer import forward
from jpt.quant.dot import is_weight
from jpt.quant.formats import FORMATS, Format
from jpt.quant.paths import map_with_path, paths
from jpt.quant.recipes import chosen, in_training, quantized_tree, recipe_of
from jpt.quant.tensors import quantize
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, units_of
from jpt.training.freeze import partition
from jpt.training.objective import language_modeling

# Of 24 rows over two shards blocks of 8 are not whole, those of 4 columns are.
BLOCKS, SMALL = Format('e4m3', 8, 4, inputs='block'), Format('e4m3', 2, 2, inputs='block')
RAGGED = Format('e4m3', 10, 10)
SQUARES = {'mixed': Format('e4m3', 4, 4, inputs='block'), 'experts': SMALL}  # for training in FP8
INTEGERS = [  # of experts, in codes or scales that have no gradient
    ('**/experts/up', Format('int4', 1, 4)),
    ('**/experts/gate', FORMATS['mxfp8']),
    ('**/experts/down', FORMATS['nvfp4']),
]
STATIC = {  # as calibration leaves it
    'mixed': [('layers/**', FORMATS['fp8_tensor']), ('**/mlp/up', FORMATS['nvfp4'])],
    'experts': [('layers/**', FORMATS['fp8_tensor'])],
}
RECIPES = {
    'mixed': [('layers/**', BLOCKS), ('**/mlp/up', FORMATS['nvfp4']), ('**/attn/v', FORMATS['int8_weights'])],
    'experts': [('layers/**', SMALL), ('**/attn/{q,k}', Format('int4', 1, 4)), ('**/experts/up', Format('int4', 1, 4))],
    'integers': INTEGERS,
}


@functools.cache
def quantized(model, fake=False):
    """The model's parameters, float32 where they are arrays, on one device; `fake`: to be trained through rounding,
    with gradients by 'block' or 'tensor', or with scales that stay as they are, if that is said.
    """
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), canonical_params(model))
    if fake == 'block':
        formats = chosen(params, recipe_of([('layers/**', SQUARES[model])]))
        return in_training(params, formats, 'block')
    if fake == 'tensor':  # scales of all tokens: those of a device where neither rows nor sequence are divided
        return in_training(params, chosen(params, recipe_of([('layers/**', FORMATS['fp8_tensor'])])), 'tensor')
    if fake == 'whole':  # which fsdp has found before tensor would divide it
        formats = chosen(params, recipe_of([('**/experts', Format('e4m3'))]))
        return in_training(params, formats, 'as_they_are')
    if fake == 'static':
        formats = chosen(params, recipe_of(STATIC[model]))
        return in_training(params, formats, 'as_they_are', static_scales(params, formats))
    formats = chosen(params, recipe_of(RECIPES['integers' if fake == 'integers' else model]))
    if fake:
        return in_training(params, formats, 'as_they_are')
    return jax.jit(lambda params: quantized_tree(params, formats))(params)


def static_scales(params, formats):
    """Scales for every layer and expert, the second ones of weights a little too small for them."""
    drawn, found = np.random.default_rng(5), {}
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if path in formats:
            lead = leaf.shape[:-2]
            found[path] = {'input_scale': drawn.uniform(0.01, 0.02, lead).astype(np.float32)}
            if formats[path].has_second:
                found[path]['scale_2'] = drawn.uniform(3e-4, 4e-4, (*lead, 1, 1)).astype(np.float32)
    return found


def in_float64(tree):
    """The arrays that are not part of a quantized weight in float64, so that sums in another order hardly differ."""
    return jax.tree.map(
        lambda leaf: leaf if is_weight(leaf) else np.asarray(leaf, np.float64),
        tree,
        is_leaf=is_weight,
    )


@functools.cache
def wanted(model, fake):
    """Loss and gradients of one device, without jpt.sharding."""
    with jax.enable_x64(True):
        return whole_step(MODELS[model], *partition(in_float64(quantized(model, fake)), ()))


@pytest.mark.parametrize(
    ('model', 'mesh', 'microbatches', 'fake'),
    [
        ('mixed', MeshConfig(fsdp=2, tensor=2, context=2), 1, False),
        ('mixed', MeshConfig(pipe=2, data=2, tensor=2), 2, False),
        ('experts', MeshConfig(expert=2, tensor=2, fsdp=2), 1, False),
        ('experts', MeshConfig(expert=4, data=2), 1, False),
        ('mixed', MeshConfig(fsdp=2, tensor=2, data=2), 1, True),
        ('experts', MeshConfig(expert=4, fsdp=2), 1, True),
        ('mixed', MeshConfig(fsdp=2, tensor=2, context=2), 2, 'block'),
        ('mixed', MeshConfig(pipe=2, data=2, tensor=2), 2, 'block'),
        ('experts', MeshConfig(expert=4, fsdp=2), 1, 'block'),
        ('mixed', MeshConfig(pipe=2, tensor=4), 1, 'tensor'),
        ('experts', MeshConfig(expert=4, fsdp=2), 1, 'integers'),
        ('experts', MeshConfig(expert=2, tensor=2, fsdp=2), 1, 'whole'),
        ('mixed', MeshConfig(pipe=2, fsdp=2, tensor=2), 2, 'static'),
        ('experts', MeshConfig(expert=4, fsdp=2), 1, 'static'),
    ],
    ids=(
        'sharded',
        'pipelined',
        'experts sharded',
        'experts exchanged',
        'trained',
        'experts trained',
        'in FP8',
        'in FP8 pipelined',
        'experts in FP8',
        'with a scale of all tokens',
        'experts in integers',
        'experts with a scale of all',
        'calibrated',
        'experts calibrated',
    ),
)
def test_loss_and_gradients(model, mesh, microbatches, fake):
    loss, gradients = wanted(model, fake)
    cfg, (params, frozen) = MODELS[model], partition(in_float64(quantized(model, fake)), ())
    objective = language_modeling(cfg, Compute('float64'))
    with jax.enable_x64(True):
        step = run_step(cfg, objective, params, frozen, mesh, 'float64', num_microbatches=microbatches)
    found = step.grads
    np.testing.assert_allclose(step.total, loss, rtol=1e-7)
    if (model, fake) == ('experts', 'block'):  # other rows of a group share a scale where the exchange orders them so
        assert worst_error(only_experts(found, True), gradients) < 0.05
        found = only_experts(found, False)
    assert worst_error(found, gradients) < 1e-5


def only_experts(tree, kept):
    """The tree without all leaves but those of experts, or without these."""
    return map_with_path(lambda path, leaf: leaf if ('/experts/' in path) == kept else None, tree)


@pytest.mark.parametrize(
    'form',
    [BLOCKS, RAGGED, FORMATS['nvfp4_weights'], FORMATS['fp8_tensor']],
    ids=('blocks', 'ragged', 'nvfp4', 'tensor'),
)
def test_codes_and_scales_do_not_depend_on_the_mesh(form):
    """Weights that lie in shards are quantized where they lie; blocks may straddle shards."""
    cfg, devices = MODELS['mixed'], make_mesh(MeshConfig(fsdp=2, tensor=2, data=2))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), canonical_params('mixed'))
    layers = {'layers': params['layers']}
    formats = chosen(layers, recipe_of([('layers/**', form)]))
    scale = jnp.ones(()) if form.inputs == 'tensor' else None

    def run(tree):
        return quantized_tree(
            tree,
            formats,
            lambda path, weight, form: quantize(
                weight, form, input_scale=None if scale is None else jnp.ones(weight.shape[:-2])
            ),
        )

    here = jax.jit(run)(layers)
    rules = Rules(devices.shape, units_of(cfg))
    placed = jax.device_put(layers, shardings(devices, param_specs(layers, rules)))
    there = jax.jit(run, out_shardings=shardings(devices, param_specs(here, rules)))(placed)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    kernel = there['layers'][0][0]['mlp']['up']['kernel']  # [repeats, 24, 16] over tensor and fsdp
    assert tuple(kernel.codes.sharding.spec) == (None, 'tensor', 'fsdp')
    whole = {BLOCKS: (None, None, 'fsdp'), RAGGED: (None, None, None)}
    if form in whole:
        assert tuple(kernel.scale.sharding.spec) == whole[form]


def test_inputs_that_a_shard_would_cut_are_refused():
    cfg, devices = MODELS['mixed'], make_mesh(MeshConfig(tensor=2, data=4))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), canonical_params('mixed'))
    made = quantized_tree(params, chosen(params, recipe_of([('**/mlp/down', FORMATS['nvfp4'])])))
    with pytest.raises(ValueError, match=r'mlp/down/kernel .*blocks of 16: expected a multiple of 32 inputs'):
        param_specs({'layers': made['layers']}, Rules(devices.shape, units_of(cfg)))


def test_experts_that_a_shard_would_cut_are_refused():
    cfg, devices = MODELS['experts'], make_mesh(MeshConfig(tensor=2, data=4))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), canonical_params('experts'))
    batch = make_batch(cfg.vocab_size)
    for form, words in ((BLOCKS, 'blocks of 8 do not divide'), (FORMATS['fp8_channel_token'], 'one scale per token')):
        formats = chosen(params, recipe_of([('**/experts', form)]))
        made = quantized_tree(params, formats) | {'embed': {'embedding': jnp.zeros((54, cfg.width))}}
        with jax.set_mesh(devices), pytest.raises(ValueError, match=words):
            jax.eval_shape(lambda p: forward(cfg, p, batch.tokens, batch.positions, batch.segment_ids).hidden_BTD, made)
