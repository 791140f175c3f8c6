"""Percentiles from counts beside sorting, and counts of any batches."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpt.quant.histogram import BINS, counts_of, percentile_of

PERCENTS = (50.0, 99.0, 99.9, 100.0)


def drawn(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    return (rng.standard_t(2, shape) * np.exp(rng.uniform(-30, 30, shape[-1]))).astype(np.float32)


@pytest.mark.parametrize('percent', PERCENTS)
def test_percentiles_are_those_of_sorted_numbers(percent):
    x, real = drawn(3, 50, 7), np.random.default_rng(1).random((3, 50)) < 0.8
    for values, tolerance in ((x, 2.0**-8), (x.astype(ml_dtypes.bfloat16), 0)):
        counts = np.asarray(counts_of(jnp.asarray(values), jnp.asarray(real)))
        wanted = np.percentile(np.abs(values[real].astype(np.float64)), percent, method='inverted_cdf')
        assert counts.sum() == real.sum() * 7
        np.testing.assert_allclose(percentile_of(counts, percent), wanted, rtol=tolerance)


def test_counts_of_batches_add_up_and_padding_may_hold_anything():
    x = drawn(4, 9, 5)
    real = np.ones((4, 9), bool)
    real[2, 4:] = False
    x[2, 4:] = np.nan
    whole = counts_of(jnp.asarray(x), jnp.asarray(real))
    parts = [counts_of(jnp.asarray(x[row : row + 1]), jnp.asarray(real[row : row + 1])) for row in range(4)]
    np.testing.assert_array_equal(whole, np.sum(parts, axis=0))
    assert whole[-1] == 0


def test_edges():
    x = np.float32([0, -0.0, 3.4e38, 1e-30, np.inf, np.nan])
    counts = np.asarray(counts_of(jnp.asarray(x)[None, None], jnp.ones((1, 1), bool)))
    assert counts.shape == (BINS,)
    assert (counts[0], counts[-1]) == (2, 3)  # the largest float32 numbers are nearer to infinity
    both = np.stack([counts, np.zeros_like(counts)])
    np.testing.assert_array_equal(percentile_of(both, 30), [0, 0])
    assert percentile_of(both, 100)[0] == np.inf
