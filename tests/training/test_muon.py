"""Newton-Schulz against float64 numpy, matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.training.muon import orthogonalize, scale_of


def _newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """One matrix in float64, through its singular values: x -> a x + b x^3 + c x^5 on each of them."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt(np.square(values).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize('shape', [(3, 6, 10), (2, 2, 10, 4)])
def test_stacked_matrices_are_each_orthogonalized(shape):
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    matrices[0] *= 1e-6
    got = np.asarray(jax.jit(orthogonalize)(matrices)).reshape(-1, *shape[-2:])
    expected = [_newton_schulz(matrix) for matrix in matrices.astype(np.float64).reshape(-1, *shape[-2:])]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    singular = np.linalg.svd(got, compute_uv=False)
    assert singular.min() > 0.3
    assert singular.max() < 1.25


def test_bfloat16_is_close_and_zeros_stay_zero():
    matrices = np.random.default_rng(1).normal(size=(2, 6, 6)).astype(np.float32)
    matrices[1] = 0
    got = np.asarray(jax.jit(lambda x: orthogonalize(x, dtype=jnp.bfloat16).astype(jnp.float32))(matrices))
    np.testing.assert_allclose(got[0], _newton_schulz(matrices[0].astype(np.float64)), atol=0.1)
    assert not got[1].any()


def test_scales_are_for_out_in_kernels():
    assert scale_of((8, 64, 16), 'spectral') == 2.0  # 64 outputs of 16 inputs
    assert scale_of((8, 16, 64), 'spectral') == 1.0
    assert scale_of((25, 9), 'rms') == scale_of((9, 25), 'rms') == pytest.approx(1.0)


def test_the_rms_scale_gives_updates_the_size_of_adamw():
    matrix = np.random.default_rng(2).normal(size=(20, 40))
    update = scale_of(matrix.shape, 'rms') * _newton_schulz(matrix)
    assert np.sqrt(np.square(update).mean()) == pytest.approx(0.2, rel=0.15)
