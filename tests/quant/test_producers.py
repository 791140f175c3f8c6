"""Deferred producers: the bits of rounding the array that they stand for, its gradients, and each made once."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from formulas import expected

from jpt.kernels import block_quantize
from jpt.kernels.block_quantize import silu_gated
from jpt.quant import producers
from jpt.quant.dot import LoraKernel, dot, grouped_dot
from jpt.quant.formats import FORMATS, Format
from jpt.quant.producers import Gated, Given, Normed
from jpt.quant.products import quantized_dot
from jpt.quant.tensors import FakeQuant, quantize

TOKENS, OUT, IN = 6, 24, 320
RNG = np.random.default_rng(3)
X, GATE = (RNG.standard_normal((2, TOKENS, IN)) * np.exp(RNG.uniform(-2, 2, (2, TOKENS, 1)))).astype(np.float32)
SCALE = RNG.uniform(0.5, 2, IN).astype(np.float32)
W = RNG.standard_t(4, (OUT, IN)).astype(np.float32)
DY = RNG.standard_normal((TOKENS, OUT)).astype(np.float32)
KINDS = {
    'normed': lambda x, gate, scale: Normed(x, scale, 1e-5),
    'normed with an offset': lambda x, gate, scale: Normed(x, scale, 1e-5, 1.0),
    'gated': lambda x, gate, scale: Gated(gate, x, silu_gated),
    'gated by another': lambda x, gate, scale: Gated(gate, x, lambda g, u: jnp.tanh(g) * u),
    'given': lambda x, gate, scale: Given(x),
}


def in_float64(kind, x, gate, scale):
    """What a producer stands for."""
    x, gate, scale = (np.asarray(array, np.float64) for array in (x, gate, scale))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return {
        'normed': normed * scale,
        'normed with an offset': normed * (1 + scale),
        'gated': gate / (1 + np.exp(-gate)) * x,
        'gated by another': np.tanh(gate) * x,
        'given': x,
    }[kind]


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
def test_products_are_those_of_the_array_bit_by_bit(kind, dtype):
    """Fused and not, packed and fake, in one program; the array and its codes as numpy has them."""
    x, gate = X.astype(dtype), GATE.astype(dtype)
    form = FORMATS['fp8_block']

    @jax.jit
    def run(x, gate, scale, w):
        given = KINDS[kind](x, gate, scale)
        array = KINDS[kind](x, gate, scale).dense()
        kernels = quantize(w, form), FakeQuant(w, format=form)
        return array, [dot(given, kernel) for kernel in kernels], [dot(array, kernel) for kernel in kernels]

    array, fused, plain = run(x, gate, SCALE, W)
    seen = np.asarray(array)
    np.testing.assert_allclose(seen.astype(np.float64), in_float64(kind, x, gate, SCALE), rtol=8 * jnp.finfo(dtype).eps)
    for one in (*fused, *plain):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(fused[0]).view(np.uint8))
    rows = np.concatenate([expected(row[None].astype(np.float32), Format('e4m3', 1, 128))[-1] for row in seen])
    wanted = rows.astype(np.float64) @ expected(W, form)[-1].astype(np.float64).T
    error = np.linalg.norm(np.asarray(fused[0], np.float64) - wanted) / np.linalg.norm(wanted)
    assert error < (1e-6 if dtype == np.float32 else 4e-3)


@pytest.mark.parametrize('kind', ['normed', 'gated'])
def test_codes_are_those_of_the_array(kind):
    """Of the reference forms themselves, with both kinds of scales."""

    @partial(jax.jit, static_argnums=0)
    def run(scale, x, gate, weight):
        given = KINDS[kind](x, gate, weight)
        whole = producers.Lies((None,))
        return given.codes(scale, whole), block_quantize.quantize_rows(given.dense(), scale=scale)

    for scale in ('float32', 'power_of_two'):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            found, wanted = run(scale, X.astype(dtype), GATE.astype(dtype), SCALE)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize('kind', ['normed', 'gated'])
def test_gradients_go_through_the_array(kind):
    """Straight through: those of the product with the weight's numbers, and of the inputs before they are rounded."""
    form = FORMATS['fp8_block']

    def loss(make, operands, w):
        given = make(*operands)
        return jnp.vdot(dot(given, FakeQuant(w, format=form)) + dot(given, quantize(W, form)), DY)

    fused = jax.jit(jax.grad(partial(loss, KINDS[kind]), argnums=(0, 1)))((X, GATE, SCALE), W)
    numbers = 2 * expected(W, form)[-1]
    through = jax.grad(lambda operands: jnp.vdot(KINDS[kind](*operands).dense() @ numbers.T, DY))((X, GATE, SCALE))
    for one, other in zip(fused[0], through, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * max(np.linalg.norm(other), 1e-9)
    array = in_float64(kind, X, GATE, SCALE).astype(np.float32)
    rows = np.concatenate([expected(row[None], Format('e4m3', 1, 128))[-1] for row in array])
    np.testing.assert_allclose(fused[1], DY.T.astype(np.float64) @ rows, rtol=2e-3, atol=2e-3)


def test_all_readers_share_one_rounding(monkeypatch):
    """Three weights and an adapter's read one norm: it is rounded once, and once more by a weight with factors."""
    calls = []
    for name in ('quantize_normed', 'quantize_rows'):
        real = getattr(producers, name)
        monkeypatch.setattr(
            producers, name, lambda *args, name=name, real=real, **options: calls.append(name) or real(*args, **options)
        )
    form = FORMATS['fp8_block']
    one = quantize(W, form)
    adapted = LoraKernel(one, jnp.zeros((2, IN)), jnp.zeros((OUT, 2)), 1.0)
    own = quantize(W, form, input_factor=jnp.ones(IN))

    def run(x, scale):
        given = Normed(x, scale, 1e-5)
        return [dot(given, kernel) for kernel in (one, one, FakeQuant(W, format=form), adapted, own)]

    jax.eval_shape(run, X, SCALE)
    assert calls == ['quantize_normed', 'quantize_rows']


@pytest.mark.parametrize('name', ['fp8_channel_token', 'mxfp8', 'nvfp4', 'int8', 'fp8_block_weights', 'int4_weights'])
def test_other_formats_take_the_array(name):
    kernel = quantize(W, FORMATS[name])

    @jax.jit
    def run(x, scale):
        given = Normed(x, scale, 1e-5)
        return dot(given, kernel), dot(given, kernel), dot(Normed(x, scale, 1e-5).dense(), kernel)

    one, again, wanted = run(X, SCALE)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(wanted))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(wanted))


def test_experts_take_producers():
    kernels = quantize(np.stack([W, -2 * W]), FORMATS['fp8_block'])
    sizes = jnp.asarray([2, 3], jnp.int32)

    @jax.jit
    def run(gate, up):
        given = Gated(gate, up, silu_gated)
        return grouped_dot(given, kernels, sizes), quantized_dot(given, quantize(W, FORMATS['fp8_block']))

    found, alone = (np.asarray(y) for y in run(GATE, X))
    wanted = alone * np.array([1, 1, -2, -2, -2, 0])[:, None]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4 * np.abs(wanted).max())
