"""The search for scales against all candidates tried in numpy float64, and what it may never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import blocks_amax, expected, spread

from jpt.quant.amax_search import MULTIPLIERS, searched_amax
from jpt.quant.formats import FORMATS, Format
from jpt.quant.tensors import numbers_of, quantize

FORMS = {
    'int4': Format('int4', 1, 24),
    'int8': FORMATS['int8_weights'],
    'e4m3 blocks': Format('e4m3', 48, 20),
    'e4m3 tensor': Format('e4m3'),
    'power of two': Format('e4m3', 1, scale='power_of_two'),
    'mxfp8': FORMATS['mxfp8'],
    'nvfp4': FORMATS['nvfp4'],
}
FEW = (1.0, 0.4, 0.7, 0.85, 1.2, 1.5)


def drawn(*shape: int) -> np.ndarray:
    random = np.random.default_rng(7)
    weight = random.standard_t(3, shape).astype(np.float32) * np.exp(random.uniform(-3, 3, shape[-1]))
    weight[..., :3, :] *= 1e-25  # squares of which are no float32 numbers
    weight[..., -1, :] = 0
    return weight.astype(np.float32)


def numbers_with(weight: np.ndarray, form: Format, amax: np.ndarray) -> np.ndarray:
    """What a matrix becomes where blocks have these largest values: by a formula, but for the rounding to codes."""
    second = None
    if form.scale == 'e4m3':
        second = jnp.asarray(blocks_amax(weight, form.rows, form.columns).max() / np.float32(2688)).reshape(1, 1)
    return np.asarray(numbers_of(quantize(weight, form, amax=amax, scale_2=second)), np.float64)


def errors(weight: np.ndarray, form: Format, amax: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The sum of squares of every block over that of its largest value, float64."""
    out, inner = weight.shape
    rows, columns = form.rows or out, form.columns or inner
    largest = blocks_amax(weight, form.rows, form.columns).astype(np.float64)
    unit = spread(np.where(largest > 0, largest, 1), weight.shape, form.rows, form.columns)
    square = ((numbers_with(weight, form, amax) - weight) / unit) ** 2 * squares
    found = np.zeros_like(largest)
    for i, j in np.ndindex(found.shape):
        found[i, j] = square[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].sum()
    return found


@pytest.mark.parametrize('name', FORMS)
def test_no_candidate_is_better_in_any_block(name):
    form, stack = FORMS[name], drawn(2, 2, 60, 48)
    squares = np.exp(np.random.default_rng(1).uniform(-4, 4, (2, 2, 48))).astype(np.float32)
    for given, columns in ((None, np.ones_like(squares)), (squares, squares)):
        amax, second = searched_amax(stack, form, given, FEW)
        for at in np.ndindex(2, 2):
            largest = blocks_amax(stack[at], form.rows, form.columns)
            tried = [largest * np.float32(one) for one in FEW]
            ours = errors(stack[at], form, np.asarray(amax[at]), columns[at])
            least = np.min([errors(stack[at], form, one, columns[at]) for one in tried], axis=0)
            np.testing.assert_allclose(ours, least, rtol=1e-5)
            assert all(value in [one.reshape(-1)[i] for one in tried] for i, value in enumerate(amax[at].reshape(-1)))
            if second is not None:
                np.testing.assert_array_equal(second[at].reshape(()), largest.max() / np.float32(2688))


@pytest.mark.parametrize('name', FORMS)
def test_the_error_is_never_larger_than_without_a_search(name):
    form, weight = FORMS[name], drawn(60, 48)
    amax, second = searched_amax(weight, form)
    numbers = np.asarray(numbers_of(quantize(weight, form, amax=amax, scale_2=second)), np.float64)
    plain = expected(weight, form)[3].astype(np.float64)
    ours, without = (np.square(each - weight).sum() for each in (numbers, plain))
    assert ours <= without * (1 + 1e-6)
    if name in ('int4', 'nvfp4'):
        assert ours < 0.95 * without


def test_columns_that_nothing_reads_do_not_count():
    """A block of an outlier that is multiplied by zeros, and small numbers: only the latter are to be kept."""
    weight = np.full((1, 8), 0.1, np.float32)
    weight[0, 3] = 0.3
    squares = np.ones(8, np.float32)
    squares[3] = 0
    form = Format('int4', 1, 8)
    amax, _ = searched_amax(weight, form, squares)
    numbers = np.asarray(numbers_of(quantize(weight, form, amax=amax)))[0]
    np.testing.assert_allclose(np.delete(numbers, 3), 0.1, rtol=0.02)
    assert MULTIPLIERS[0] == 1
    assert len(set(MULTIPLIERS)) == len(MULTIPLIERS)
    # Where nothing is read at all, all errors are equal and the scale is that of the largest value.
    assert searched_amax(weight, form, np.zeros(8, np.float32))[0].item() == np.float32(0.3)


def test_half_precision_and_a_mesh_give_the_same():
    weight, form = drawn(2, 64, 48), FORMATS['nvfp4']
    half = jnp.asarray(weight, jnp.bfloat16)
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))
    whole, wide, divided = (
        searched_amax(each, form)[0] for each in (half, half.astype(jnp.float32), jax.device_put(half, spec))
    )
    np.testing.assert_array_equal(whole, wide)
    np.testing.assert_array_equal(whole, divided)
