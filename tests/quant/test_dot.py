"""`dot` against float64 numpy, in scan and under differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.quant.dot import LoraKernel, dense, dot


def _lora(rng: np.random.Generator, lead: tuple[int, ...] = ()) -> LoraKernel:
    base, a, b = (rng.normal(size=(*lead, *shape)).astype(np.float32) for shape in ((5, 4), (2, 4), (5, 2)))
    return LoraKernel(base, a, b, scale=0.5)


def _reference(x, kernel) -> np.ndarray:
    base, a, b = (np.asarray(leaf, np.float64) for leaf in (kernel.base, kernel.a, kernel.b))
    return np.asarray(x, np.float64) @ (base + 0.5 * b @ a).T


def test_array_kernel_is_out_in_and_the_result_keeps_the_dtype_of_x():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    whole, half = jax.jit(lambda x, kernel: (dot(x, kernel), dot(x.astype(jnp.bfloat16), kernel)))(x, kernel)
    np.testing.assert_allclose(whole, np.einsum('bti,oi->bto', x, kernel), rtol=1e-5)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), np.einsum('bti,oi->bto', x, kernel), atol=0.1)


def test_lora_kernel_adds_the_scaled_low_rank_product():
    rng = np.random.default_rng(1)
    kernel, x = _lora(rng), rng.normal(size=(3, 4)).astype(np.float32)
    product, whole = jax.jit(lambda x, kernel: (dot(x, kernel), dense(kernel)))(x, kernel)
    np.testing.assert_allclose(product, _reference(x, kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole, _reference(np.eye(4), kernel).T, rtol=1e-5, atol=1e-6)
    assert (kernel.shape, kernel.ndim, kernel.dtype) == ((5, 4), 2, jnp.float32)


def test_stacked_lora_runs_in_scan_and_gives_gradients_to_its_factors():
    rng = np.random.default_rng(2)
    stack, x = _lora(rng, lead=(3,)), rng.normal(size=(2, 4)).astype(np.float32)
    assert stack.shape == (3, 5, 4)

    def total(kernel):
        def step(carry, layer):
            return carry + jnp.sum(dot(jnp.asarray(x), layer)), None

        return jax.lax.scan(step, jnp.float32(0), kernel)[0]

    value, gradient = jax.jit(jax.value_and_grad(total))(stack)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
    np.testing.assert_allclose(value, sum(_reference(x, layer).sum() for layer in layers), rtol=1e-5)
    # d sum(x (b a)^T) / d b = 1 (x a^T summed over rows)
    expected = [0.5 * np.ones((5, 1)) @ (x.sum(0) @ np.asarray(layer.a).T)[None] for layer in layers]
    np.testing.assert_allclose(gradient.b, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(gradient, LoraKernel)
    assert gradient.scale == 0.5


def test_an_unknown_kernel_type_is_refused_by_name():
    with pytest.raises(TypeError, match='kernel of type str'):
        dot(np.ones(4), 'kernel')
    with pytest.raises(TypeError, match='kernel of type dict'):
        dense({})
