"""Weights trained through rounding and divided over fsdp: their codes travel, and are those of the whole weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jpt.quant.dot import dot
from jpt.quant.formats import FORMATS, Format
from jpt.quant.packing import parts_of
from jpt.quant.products import quantized
from jpt.quant.tensors import FakeQuant, quantize
from jpt.sharding.fsdp import gather, keep_activations
from jpt.sharding.mesh import MeshConfig, make_mesh

OUT, IN, ROWS = 24, 64, 6
# `down` is divided over its outputs, `up` over its inputs.
DIVIDED = {'up': P(None, 'fsdp'), 'down': P('fsdp')}
BLOCKS = Format('e4m3', 4, 4, inputs='block')
WHOLE = {
    'blocks': BLOCKS,
    'tensor': Format('e4m3'),
    'channel': FORMATS['fp8_weights'],
    'mxfp8': FORMATS['mxfp8'],
    'nvfp4': FORMATS['nvfp4_weights'],
    'int4': Format('int4', 1, 32),
    'int8': FORMATS['int8_weights'],
}
CUT = {  # parts of 12 rows and of 32 columns end within blocks
    'cut': Format('e4m3', 5, 5),
    'cut pieces': Format('e4m3', 8, 24, inputs='block'),
    'cut e8m0': Format('e4m3', 8, 24, 'e8m0'),
    'cut nvfp4': Format('e2m1', 8, 24, 'e4m3'),
    'cut int4': Format('int4', 8, 24),
}
GRID, CUT_GRID = (Format('int4', *block, 'e4m3_grid', inputs='tensor') for block in ((1, 32), (8, 24)))


@functools.cache
def given():
    """A weight whose blocks are of all sizes, inputs, and a cotangent."""
    random = np.random.default_rng(0)
    size = np.exp(random.normal(size=(OUT, IN)))
    drawn = size * random.normal(size=(OUT, IN)), random.normal(size=(ROWS, IN)), random.normal(size=(ROWS, OUT))
    return [each.astype(np.float32) for each in drawn]


def on_mesh(name, body):
    """`body` of the weight's parts on two shards of fsdp and two of tensor."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spec = DIVIDED[name]
    return jax.shard_map(
        body, mesh=mesh, in_specs=spec, out_specs=(P(), spec), axis_names={'fsdp', 'data'}, check_vma=False
    )


@pytest.mark.parametrize('name', DIVIDED)
@pytest.mark.parametrize('form', [*WHOLE.values(), *CUT.values()], ids=(*WHOLE, *CUT))
def test_codes_scales_and_gradients_are_those_of_the_whole_weight(name, form):
    weight, x, dy = given()

    def body(part):
        def product(part):
            whole = gather({'mlp': {name: {'kernel': FakeQuant(part, format=form)}}}, 'float32')
            kernel = whole['mlp'][name]['kernel']
            return dot(jnp.asarray(x), kernel), parts_of(quantized(kernel))

        y, pull, parts = jax.vjp(product, part, has_aux=True)
        return (y, parts), pull(jnp.asarray(dy))[0]

    (y, parts), gradient = jax.jit(on_mesh(name, body))(weight)
    wanted, pull = jax.vjp(lambda weight: dot(jnp.asarray(x), FakeQuant(weight, format=form)), weight)
    for part, values in parts_of(jax.jit(quantize, static_argnums=1)(weight, form)).items():
        np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(parts[part]).view(np.uint8))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, 2 * pull(jnp.asarray(dy))[0], rtol=1e-5, atol=1e-5)  # of two devices


def test_gradients_are_clipped_where_the_parts_lie():
    """Weights beyond a second scale that is given: as on one device, of which there are two."""
    weight, x, dy = given()
    second = np.float32([[0.5 / 2688]])

    def kernel(weight):
        return FakeQuant(weight, scale_2=jnp.asarray(second), format=FORMATS['nvfp4_weights'], clipped=True)

    def body(part):
        def product(part):
            return dot(
                jnp.asarray(x), gather({'mlp': {'up': {'kernel': kernel(part)}}}, 'float32')['mlp']['up']['kernel']
            )

        y, pull = jax.vjp(product, part)
        return y, pull(jnp.asarray(dy))[0]

    _, gradient = jax.jit(on_mesh('up', body))(weight)
    wanted = jax.vjp(lambda weight: dot(jnp.asarray(x), kernel(weight)), weight)[1](jnp.asarray(dy))[0]
    np.testing.assert_allclose(gradient, 2 * wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradient) == 0, np.abs(weight) > 0.5)


def test_a_weight_with_factors_of_inputs_is_gathered_as_it_is():
    weight, x, _ = given()
    factor = np.random.default_rng(1).uniform(0.1, 4, IN).astype(np.float32)

    def product(weight):
        kernel = FakeQuant(weight, input_factor=jnp.asarray(factor), format=FORMATS['fp8_weights'])
        return kernel, lambda kernel: dot(jnp.asarray(x), kernel)

    def body(part):
        kernel, run = product(part)
        return run(gather({'mlp': {'down': {'kernel': kernel}}}, 'float32')['mlp']['down']['kernel']), part

    kernel, run = product(jnp.asarray(weight))
    np.testing.assert_allclose(jax.jit(on_mesh('down', body))(weight)[0], run(kernel), rtol=1e-5, atol=1e-5)


def equations(jaxpr):
    """All equations of a program, inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from equations(inner)


@pytest.mark.parametrize('name', DIVIDED)
def test_what_travels_and_what_is_kept(name):
    """Codes and scales forward, in both passes; backward the part alone is kept."""
    weight, x, dy = given()
    kept = []

    def body(part):
        params = {'mlp': {name: {'kernel': FakeQuant(part, format=BLOCKS)}}}

        def product(params):
            return dot(jnp.asarray(x), gather(params, 'float32')['mlp'][name]['kernel'])

        y, pull = jax.vjp(jax.checkpoint(product, policy=keep_activations(params)), params)
        kept.extend(leaf.shape for leaf in jax.tree.leaves(pull))
        return y, pull(jnp.asarray(dy))[0]['mlp'][name]['kernel'].weight

    found = list(equations(jax.make_jaxpr(on_mesh(name, body))(weight).jaxpr))
    avals = [eqn.outvars[0].aval for eqn in found if eqn.primitive.name == 'all_gather']
    # tensor divides outputs of `up` and inputs of `down` inside.
    codes, scales = ((12, 64), (3, 16)) if name == 'up' else ((24, 32), (6, 8))
    gathered = sorted((str(aval.dtype), aval.shape) for aval in avals)
    assert gathered == 2 * [('float32', scales)] + 2 * [('float8_e4m3fn', codes)]
    shape = {'up': (OUT, IN // 2), 'down': (OUT // 2, IN)}[name]
    assert [each for each in kept if len(each) == 2] == [shape, x.shape]


@pytest.mark.parametrize('name', DIVIDED)
@pytest.mark.parametrize('form', [*WHOLE.values(), CUT['cut'], GRID, CUT_GRID], ids=(*WHOLE, 'cut', 'grid', 'cut grid'))
def test_experts_in_bfloat16(name, form):
    """Stacked [E, out, in]: the bits of each expert's whole weight."""
    weight = jnp.stack([given()[0], 3 * given()[0]]).astype(jnp.bfloat16)
    spec = P(None, *DIVIDED[name])

    def body(part):
        whole = gather({'mlp': {'experts': {name: {'kernel': FakeQuant(part, format=form)}}}}, 'float32')
        return parts_of(quantized(whole['mlp']['experts'][name]['kernel']))

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {'fsdp', 'data'}
    parts = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=P(), axis_names=axes, check_vma=False))(
        weight
    )
    for part, values in parts_of(jax.jit(quantize, static_argnums=1)(weight, form)).items():
        np.testing.assert_array_equal(np.asarray(values).view(np.uint8), np.asarray(parts[part]).view(np.uint8))
