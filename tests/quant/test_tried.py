"""A weight with a quantized form beside it: its product, what gradients see, and what the other would change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import expected

from jpt.quant.dot import dense, dot, grouped_dot
from jpt.quant.formats import FORMATS
from jpt.quant.tensors import quantize
from jpt.quant.tried import Tried

RNG = np.random.default_rng(2)
X = RNG.standard_normal((6, 32)).astype(np.float32)
W = RNG.standard_normal((2, 24, 32)).astype(np.float32)
DY = RNG.standard_normal((6, 24)).astype(np.float32)
SIZES = np.array([2, 3], np.int32)  # of two experts; the last row is beyond all
FORM = FORMATS['int4_weights']


def product(x, weights, sizes):
    """Rows times the weight of their group, float64."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([x[row].astype(np.float64) @ weights[at].astype(np.float64).T for row, at in enumerate(group)])


@pytest.mark.parametrize('grouped', [False, True])
def test_the_score_is_the_change_of_the_output_weighed_by_its_gradient(grouped):
    weight, sizes = (W, SIZES) if grouped else (W[0], np.array([6], np.int32))
    other = np.stack([expected(one, FORM)[-1] for one in W])
    rows = sizes.sum()

    def out(x, base, on, score):
        kernel = Tried(base, quantize(base, FORM), on, score, 32)
        return grouped_dot(x, kernel, jnp.asarray(sizes)) if grouped else dot(x, kernel)

    @jax.jit
    def run(x, base, on):
        y, pull = jax.vjp(lambda x, score: out(x, base, on, score), x, jnp.float32(7))
        return y, *pull(jnp.asarray(DY))

    y, dx, score = run(X, weight, False)
    instead, _, again = run(X, weight, True)
    plain, changed = product(X[:rows], W, sizes), product(X[:rows], other, sizes)
    np.testing.assert_allclose(y[:rows], plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(instead[:rows], changed, rtol=1e-5, atol=1e-5)
    wanted = np.square(DY[:rows].astype(np.float64) * (changed - plain)).sum()
    assert float(score) == pytest.approx(wanted, rel=1e-4)
    assert float(again) == pytest.approx(wanted, rel=1e-4)
    back = product(DY[:rows], np.swapaxes(W, 1, 2), sizes)
    np.testing.assert_allclose(dx[:rows], back, rtol=1e-5, atol=1e-5)
    assert not np.asarray(dx[rows:]).any()


def test_a_tried_weight_stands_for_no_array():
    tried = Tried(W[0], quantize(W[0], FORM), np.zeros((), bool), np.zeros((), np.float32), 32)
    assert (tried.shape, tried.ndim, tried.dtype) == (W[0].shape, 2, W.dtype)
    with pytest.raises(TypeError, match='of type Tried'):
        dense(tried)
