"""Products with quantized weights against float64 products of what numpy's formulas say codes and scales stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import expected

from jpt.models.block import remat_policy
from jpt.quant.dot import dot, grouped_dot
from jpt.quant.formats import FORMATS, Format
from jpt.quant.products import round_inputs
from jpt.quant.tensors import FakeQuant, QTensor, quantize
from jpt.sharding.stages import keep_parts

TOKENS, OUT, IN, EXPERTS = 5, 40, 160, 3
SIZES = np.array([2, 0, 3], np.int32)  # rows of each expert
RNG = np.random.default_rng(1)
X = RNG.standard_normal((TOKENS, IN)).astype(np.float32) * np.exp(RNG.uniform(-2, 2, (TOKENS, 1))).astype(np.float32)
W = RNG.standard_t(4, (EXPERTS, OUT, IN)).astype(np.float32)
DY = RNG.standard_normal((TOKENS, OUT)).astype(np.float32)
SCALE = np.float32(0.013)


def rounded(x, form):
    """The inputs as the layer sees them: each token a weight [1, in] of its own."""
    if form.inputs == 'as_they_are':
        return x.astype(np.float64)
    if form.inputs == 'tensor':
        largest = {'e4m3': 448, 'int8': 127, 'int4': 448}[form.element]  # of int4 on E4M3's grid
        codes = np.clip(x / SCALE, -largest, largest)
        codes = codes.astype(jnp.float8_e4m3fn) if largest == 448 else np.rint(codes)
        return codes.astype(np.float64) * SCALE
    own = Format(form.element, 1, (form.input_columns or form.columns) if form.inputs == 'block' else 0, form.scale)
    return np.concatenate([expected(row[None], own)[-1] for row in x]).astype(np.float64)


def kernel_of(weight, form, kind):
    lead = weight.shape[:-2]
    scale = jnp.full(lead, SCALE) if form.inputs == 'tensor' else None
    if kind is FakeQuant:
        return FakeQuant(jnp.asarray(weight), scale, format=form)
    return quantize(weight, form, input_scale=scale)


def error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


OTHERS = {
    'int8 in blocks': Format('int8', 1, 32, inputs='block'),
    'rows, inputs in blocks': Format('e4m3', 1, inputs='block', input_columns=64),
    'tensor, inputs in blocks': Format('e4m3', inputs='block', input_columns=64),
    'blocks, inputs in others': Format('e4m3', 16, 16, inputs='block', input_columns=64),
    'blocks, one scale of inputs': Format('e4m3', 16, 16, inputs='tensor'),
    'blocks, a scale per token': Format('e4m3', 16, 16, inputs='token'),
}


@pytest.mark.parametrize('name', [*FORMATS, *OTHERS])
def test_product_and_gradients(name):
    form = FORMATS.get(name) or OTHERS[name]
    seen, numbers = rounded(X, form), expected(W[0], form)[-1].astype(np.float64)

    @jax.jit
    def run(real, fake):
        y = dot(X, real)
        again, pull = jax.vjp(dot, X, fake)
        return y, again, pull(DY), jax.vjp(lambda x: dot(x, real), X)[1](DY)[0]

    y, again, (dx, dfake), dx_real = run(kernel_of(W[0], form, QTensor), kernel_of(W[0], form, FakeQuant))
    np.testing.assert_array_equal(np.asarray(y), np.asarray(again))  # real and fake, bit by bit
    assert error(y, seen @ numbers.T) < 1e-6
    assert error(dx, DY.astype(np.float64) @ numbers) < 1e-6
    assert error(dfake.weight, DY.astype(np.float64).T @ seen) < 1e-6
    np.testing.assert_array_equal(np.asarray(dx), np.asarray(dx_real))


@pytest.mark.parametrize('name', ['fp8_tensor', 'fp8_block', 'nvfp4', 'int8', 'int4_weights', 'w4a8'])
def test_products_of_experts(name):
    form = FORMATS[name]
    seen = rounded(X, form)
    numbers = np.stack([expected(w, form)[-1] for w in W]).astype(np.float64)
    expert = np.repeat(np.arange(EXPERTS), SIZES)

    @jax.jit
    def run(real, fake):
        again, pull = jax.vjp(lambda x, w: grouped_dot(x, w, jnp.asarray(SIZES)), X, fake)
        return grouped_dot(X, real, jnp.asarray(SIZES)), again, pull(DY)

    y, again, (dx, dfake) = run(kernel_of(W, form, QTensor), kernel_of(W, form, FakeQuant))
    np.testing.assert_array_equal(np.asarray(y), np.asarray(again))
    assert error(y, np.einsum('mi,moi->mo', seen, numbers[expert])) < 1e-6
    assert error(dx, np.einsum('mo,moi->mi', DY, numbers[expert])) < 1e-6
    wanted = np.zeros(W.shape)
    for row, e in enumerate(expert):
        wanted[e] += np.outer(DY[row].astype(np.float64), seen[row])
    assert error(dfake.weight, wanted) < 1e-6


def test_factors_of_inputs():
    factor = np.exp(RNG.uniform(-1, 1, (EXPERTS, IN))).astype(np.float32)
    form = FORMATS['int8_weights']
    numbers = np.stack([expected(w / f, form)[-1] for w, f in zip(W, factor, strict=True)]).astype(np.float64)
    expert = np.repeat(np.arange(EXPERTS), SIZES)
    fake = FakeQuant(jnp.asarray(W), None, jnp.asarray(factor), format=form)
    y, pull = jax.vjp(lambda w: grouped_dot(X, w, jnp.asarray(SIZES)), fake)
    assert error(y, np.einsum('mi,moi->mo', X * factor[expert].astype(np.float64), numbers[expert])) < 1e-6
    wanted = np.zeros(W.shape)
    for row, e in enumerate(expert):  # y = (x f) (w / f): the factors cancel in the weight's gradient
        wanted[e] += np.outer(DY[row].astype(np.float64), X[row])
    assert error(pull(DY)[0].weight, wanted) < 1e-6
    one = jax.tree.map(lambda leaf: leaf[1], quantize(W, form, input_factor=jnp.asarray(factor)))
    assert error(dot(X, one), (X * factor[1]) @ numbers[1].T) < 1e-6


@pytest.mark.parametrize(('name', 'limit'), [('fp8_tensor', 448), ('int8_tensor', 127), ('nvfp4', 6 * 448)])
def test_inputs_beyond_their_scale_pass_no_gradient_if_that_is_asked(name, limit):
    """Each expert has a scale of its own; those that saturate are told apart from those that are rounded."""
    scales, groups = np.array([0.5, 1.0, 2.0], np.float32) / limit, np.repeat(np.arange(EXPERTS), SIZES)
    beyond = np.abs(X) > limit * scales[groups][:, None]
    assert 0.1 < beyond.mean() < 0.9
    plain = FakeQuant(jnp.asarray(W), jnp.asarray(scales), format=FORMATS[name])

    @jax.jit
    def gradients(kernels):
        return jax.vjp(lambda x, w: grouped_dot(x, w, jnp.asarray(SIZES)), jnp.asarray(X), kernels)[1](DY)

    dx, dw = gradients(plain)
    clipped_dx, clipped_dw = gradients(dataclasses.replace(plain, clipped=True))
    np.testing.assert_array_equal(clipped_dx, np.where(beyond, 0, dx))
    np.testing.assert_array_equal(clipped_dw.weight, dw.weight)
    one = FakeQuant(jnp.asarray(W[0]), jnp.asarray(scales[0]), format=FORMATS[name], clipped=True)
    alone = jax.jit(lambda x: jax.vjp(lambda x: dot(x, one), x)[1](DY)[0])(X)
    np.testing.assert_array_equal(np.asarray(alone) == 0, np.abs(X) > 0.5)


@pytest.mark.parametrize(('name', 'limit'), [('nvfp4', 6 * 448), ('w4a8', 448)])
def test_weights_beyond_their_second_scale_have_no_gradient_if_that_is_asked(name, limit):
    scale, beyond = np.float32([[1.5 / limit]]), np.abs(W[0]) > 1.5
    assert 0.1 < beyond.mean() < 0.9
    plain = FakeQuant(jnp.asarray(W[0]), jnp.asarray(SCALE), scale_2=jnp.asarray(scale), format=FORMATS[name])

    @jax.jit
    def gradient(kernel):
        return jax.vjp(lambda w: dot(X, w), kernel)[1](DY)[0].weight

    clipped = gradient(dataclasses.replace(plain, clipped=True))
    np.testing.assert_array_equal(clipped, np.where(beyond, 0, gradient(plain)))


@pytest.mark.parametrize('name', ['nvfp4', 'w4a8', 'fp8_tensor'])
def test_what_a_scale_was_found_from_is_not_beyond_it(name):
    """Rounded down, a scale times the largest number may be a little less than what it is the scale of."""
    random = np.random.default_rng(3)

    @jax.jit
    def gradients(weight, x, input_scale):
        second = quantize(weight, FORMATS[name]).scale_2
        kernel = FakeQuant(weight, input_scale, scale_2=second, format=FORMATS[name], clipped=True)
        dx, own = jax.vjp(lambda x, kernel: dot(x, kernel), x, kernel)[1](jnp.ones((2, 8)))
        return dx, own.weight

    for _ in range(30):
        weight, x = random.normal(size=(8, 32)).astype(np.float32), random.normal(size=(2, 32)).astype(np.float32)
        largest = np.float32(448 * 6 if name == 'nvfp4' else 448)
        dx, dweight = gradients(weight, x, np.abs(x).max() / largest)
        assert np.asarray(dx)[np.abs(x) == np.abs(x).max()] != 0
        assert np.asarray(dweight)[np.abs(weight) == np.abs(weight).max()] != 0


def test_a_token_does_not_see_the_others():
    x = jnp.asarray(np.stack([X, X[::-1] * 100]))
    for name in ('fp8_channel_token', 'fp8_block', 'nvfp4', 'mxfp8'):
        whole = round_inputs(x, FORMATS[name])
        alone = round_inputs(x[0, 2], FORMATS[name])
        for part in ('codes', 'scale'):
            one, other = (np.asarray(getattr(tensor, part)) for tensor in (whole, alone))
            np.testing.assert_array_equal(one[0, 2].view(np.uint8), other.view(np.uint8))


def test_remat_keeps_what_kernels_multiply_as_it_keeps_products():
    """The blocks of a product are a loop on CPU: forward, and once more where its result is not kept."""
    packed = [quantize(W[0], FORMATS[name]) for name in ('fp8_block', 'fp8_block_weights')]
    for kernel in (*packed, FakeQuant(W[0], format=FORMATS['fp8_block'])):

        def loops(policy, kernel=kernel):
            layer = jax.checkpoint(lambda x: jnp.tanh(dot(x, kernel)), policy=policy)
            return str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(X)).count('scan[')

        assert (loops(remat_policy('dots')), loops(remat_policy('full'))) == (1, 2)


def test_nothing_that_is_made_of_a_rounded_weight_is_kept_for_the_backward_pass(capsys):
    """By the policy of layers whose weights `fsdp` gathers, which keeps what has three axes: blocks of weights have."""
    weight, x = jnp.ones((384, 256)), jnp.ones((2, 16, 256))
    for name in ('fp8_block', 'nvfp4_weights'):

        def product(weight, x, name=name):
            return jnp.tanh(dot(2 * x, FakeQuant(1 * weight, format=FORMATS[name])))

        jax.ad_checkpoint.print_saved_residuals(
            jax.checkpoint(product, policy=keep_parts({'kernel': weight})), weight, x
        )
    kept = [line.split(']')[0] for line in capsys.readouterr().out.splitlines()]
    activations = {'f32[2,16,256', 'f32[2,16,384'}
    assert set(kept) == activations | {'f32[384,256'}
    assert kept.count('f32[384,256') == 2  # the argument itself, of each format


def test_inputs_without_calibration_are_refused():
    with pytest.raises(ValueError, match='calibrate'):
        dot(jnp.asarray(X), quantize(W[0], FORMATS['fp8_tensor']))
