"""Gradients by products in eight bits against float64 products of what numpy's formulas say every operand becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import expected

from jpt.kernels.local_products import whole as whole_on
from jpt.quant import gradients
from jpt.quant.dot import dot, grouped_dot
from jpt.quant.formats import FORMATS, Format
from jpt.quant.tensors import FakeQuant, quantize

ROWS, TOKENS, OUT, IN = 2, 150, 160, 200  # runs of 128 that end early on every axis
GROUPS = np.array([130, 0, 40], np.int32)  # of 180 rows, ten are of no group
RNG = np.random.default_rng(3)


def drawn(*shape):
    """Numbers whose sizes differ from token to token and from channel to channel, with one token of zeros."""
    found = RNG.standard_normal(shape) * np.exp(RNG.uniform(-3, 3, (*shape[:-1], 1)) + RNG.uniform(-2, 2, shape[-1]))
    found[..., 1, :] = 0
    return found.astype(np.float32)


def weights(*shape):
    return (RNG.standard_t(4, shape) / 10).astype(np.float32)


def along_last(x, form):
    """Rows rounded in runs of the last axis, float64."""
    own = Format('e4m3', 1, form.columns, form.scale)
    return expected(x.reshape(-1, x.shape[-1]), own)[-1].reshape(x.shape).astype(np.float64)


def along_tokens(x, form):
    """[T, n] rounded in runs of T, float64."""
    return along_last(x.T, form).T


def error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize('form', [FORMATS['fp8_block'], Format('e4m3', 32, 32, 'power_of_two', 'block')])
def test_gradients_of_a_product(form):
    x, dy, w = drawn(ROWS, TOKENS, IN), drawn(ROWS, TOKENS, OUT), weights(OUT, IN)
    fake = FakeQuant(jnp.asarray(w), format=form, gradients='block')

    @jax.jit
    def run(x, fake, dy):
        y, pull = jax.vjp(dot, x, fake)
        return y, pull(dy)

    y, (dx, dfake) = run(x, fake, dy)
    numbers = expected(w, form)[-1].astype(np.float64)
    assert error(y, along_last(x, form) @ numbers.T) < 1e-6
    assert error(dx, along_last(dy, form) @ numbers) < 1e-6
    wanted = sum(along_tokens(dy[row], form).T @ along_tokens(x[row], form) for row in range(ROWS))
    assert error(dfake.weight, wanted) < 1e-6
    # What the roundings cost: E4M3 is off by 2.65 % (docs/quantize.md), two of them by about sqrt(2) times that.
    exact_dx, exact_dw = dy.astype(np.float64) @ w, np.einsum('btn,bti->ni', *(a.astype(np.float64) for a in (dy, x)))
    assert 0.02 < error(dx, exact_dx) < 0.05
    assert 0.02 < error(dfake.weight, exact_dw) < 0.05
    assert dx.dtype == jnp.float32
    # Kernels know tokens alone: rows filled up to whole runs, by the reference of the kernel.
    if form.columns == 128:
        real = quantize(jnp.asarray(w), form)
        where = whole_on(x.ndim)
        np.testing.assert_allclose(gradients._of_inputs(real, where, jnp.asarray(dy)), dx, rtol=1e-4, atol=1e-4)
        by_kernel = gradients._of_weights(jnp.asarray(x), where, jnp.asarray(dy), form)
        assert error(by_kernel, wanted) < 1e-6


def test_gradients_of_experts():
    form = FORMATS['fp8_block']
    rows = int(GROUPS.sum())
    x, dy, w = drawn(rows + 10, IN), drawn(rows + 10, OUT), weights(len(GROUPS), OUT, IN)
    x[rows:], dy[rows:] = np.nan, np.nan  # rows of no group
    fake = FakeQuant(jnp.asarray(w), format=form, gradients='block')

    @jax.jit
    def run(x, fake, dy):
        pull = jax.vjp(lambda x, w: grouped_dot(x, w, jnp.asarray(GROUPS)), x, fake)[1]
        given = x, quantize(fake.weight, form), jnp.asarray(GROUPS), whole_on(x.ndim), dy
        return pull(dy), (gradients._of_inputs_by_group(*given), gradients._of_weights_by_group(*given))

    (dx, dfake), (dx_by_kernel, dw_by_kernel) = run(x, fake, dy)
    wanted_dx, wanted_dw = np.zeros(x.shape), np.zeros(w.shape)
    for e, end in enumerate(np.cumsum(GROUPS)):
        own = slice(end - GROUPS[e], end)
        if GROUPS[e]:
            wanted_dx[own] = along_last(dy[own], form) @ expected(w[e], form)[-1].astype(np.float64)
            wanted_dw[e] = along_tokens(dy[own], form).T @ along_tokens(x[own], form)
    assert error(dx, wanted_dx) < 1e-6
    assert error(dx_by_kernel, wanted_dx) < 1e-6
    for dw in (dfake.weight, dw_by_kernel):
        assert error(dw, wanted_dw) < 1e-6
        assert dw.dtype == jnp.float32
        assert not np.asarray(dw[1]).any()


def whole(x, element):
    """An array rounded with one scale, float64."""
    largest, dtype = {'e4m3': (448, jnp.float8_e4m3fn), 'e5m2': (57344, jnp.float8_e5m2)}[element]
    scale = np.float32(np.abs(x).max()) / np.float32(largest)
    return np.clip(x / scale, -largest, largest).astype(dtype).astype(np.float64) * scale


def test_one_scale_per_array():
    x, dy, w = drawn(ROWS, TOKENS, IN), drawn(ROWS, TOKENS, OUT), weights(OUT, IN)
    fake = FakeQuant(jnp.asarray(w), format=FORMATS['fp8_tensor'], gradients='tensor')

    @jax.jit
    def run(x, fake, dy):
        y, pull = jax.vjp(dot, x, fake)
        return y, pull(dy)

    y, (dx, dfake) = run(x, fake, dy)
    seen, numbers, rounded = whole(x, 'e4m3'), whole(w, 'e4m3'), whole(dy, 'e5m2')
    assert error(y, seen @ numbers.T) < 1e-6
    assert error(dx, rounded @ numbers) < 1e-6
    assert error(dfake.weight, np.einsum('btn,bti->ni', rounded, seen)) < 1e-6
    # E5M2 has a bit less: twice the error of E4M3.
    assert 0.03 < error(dx, dy.astype(np.float64) @ w) < 0.1


def test_one_scale_for_all_rows_of_experts():
    rows = int(GROUPS.sum())
    x, dy, w = drawn(rows + 10, IN), drawn(rows + 10, OUT), weights(len(GROUPS), OUT, IN)
    x[rows:], dy[rows:] = np.inf, np.nan  # rows of no group
    fake = FakeQuant(jnp.asarray(w), format=FORMATS['fp8_tensor'], gradients='tensor')

    @jax.jit
    def run(x, fake, dy):
        y, pull = jax.vjp(lambda x, w: grouped_dot(x, w, jnp.asarray(GROUPS)), x, fake)
        return y, pull(dy)

    y, (dx, dfake) = run(x, fake, dy)
    seen, rounded = whole(x[:rows], 'e4m3'), whole(dy[:rows], 'e5m2')
    for e, end in enumerate(np.cumsum(GROUPS)):
        own = slice(end - GROUPS[e], end)
        if GROUPS[e]:
            numbers = whole(w[e], 'e4m3')
            assert error(y[own], seen[own] @ numbers.T) < 1e-6
            assert error(dx[own], rounded[own] @ numbers) < 1e-6
            assert error(dfake.weight[e], rounded[own].T @ seen[own]) < 1e-6


def test_bfloat16_inputs_and_weights_keep_their_dtypes():
    x, w, form = jnp.asarray(drawn(5, 32), jnp.bfloat16), jnp.asarray(weights(48, 32)), FORMATS['fp8_block']
    dy = jnp.asarray(drawn(5, 48), jnp.bfloat16)
    _, pull = jax.vjp(dot, x, FakeQuant(w, format=form, gradients='block'))
    dx, dfake = pull(dy)
    assert (dx.dtype, dfake.weight.dtype) == (jnp.bfloat16, jnp.float32)
    # The sum over tokens is not rounded to bfloat16 on its way to a float32 weight.
    wanted = along_tokens(np.asarray(dy, np.float32), form).T @ along_tokens(np.asarray(x, np.float32), form)
    assert error(dfake.weight, wanted) < 1e-6


def test_what_does_not_go_together_is_refused():
    w = jnp.ones((4, 4))
    for name in ('nvfp4', 'fp8_channel_token', 'fp8_block_weights', 'mxfp8'):
        with pytest.raises(ValueError, match=r"gradients='block' with .*: expected fp8_block"):
            FakeQuant(w, format=FORMATS[name], gradients='block')
    with pytest.raises(ValueError, match=r"gradients='tensor' with .*: expected fp8_tensor"):
        FakeQuant(w, format=FORMATS['fp8_block'], gradients='tensor')
    with pytest.raises(ValueError, match="gradients='tensor' with an input_scale: expected None"):
        dot(w, FakeQuant(w, jnp.ones(()), format=FORMATS['fp8_tensor'], gradients='tensor'))
    with pytest.raises(ValueError, match="gradients='fp8': expected one of as_they_are, block, tensor, te"):
        FakeQuant(w, format=FORMATS['fp8_block'], gradients='fp8')
