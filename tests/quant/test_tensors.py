"""Codes and scales of every format against formulas in numpy, bit by bit; what quantized weights stand for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from formulas import expected
from hypothesis import given, settings
from hypothesis import strategies as st

from jpt.quant.dot import dense
from jpt.quant.formats import FORMATS, Format, format_of
from jpt.quant.tensors import dequantize, quantize

# Ragged beyond blocks of 128, 32 and 16 on both axes; one row; blocks that divide.
SHAPES = ((192, 160), (130, 258), (1, 256), (6, 30))
ODD_BLOCKS = {
    'blocks of 48 x 20': Format('e4m3', 48, 20),
    'powers of two, rows': Format('e4m3', 1, scale='power_of_two'),
    'nvfp4 in blocks of 32': Format('e2m1', 1, 32, scale='e4m3'),
    'int4 per row': Format('int4', 1),
    'ue8m0 in blocks of 16 x 48': Format('e4m3', 16, 48, 'e8m0'),
}
ALL = FORMATS | ODD_BLOCKS
NAMES = 'fp8_block', 'fp8_tensor', 'mxfp8', 'nvfp4', 'int8', 'int4_weights', 'w4a8'
ANY_SIZE = [*map(FORMATS.get, NAMES), Format('e4m3', 8, 12, scale='power_of_two')]


@jax.jit(static_argnums=1)
def _quantized(weights, form):
    found = [quantize(weight, form) for weight in weights]
    return found, [dequantize(each) for each in found]


def codes_in(tensor):
    """The codes of a QTensor, one per element: 4-bit ones taken out of their bytes."""
    codes = np.asarray(tensor.codes)
    if not tensor.format.packed:
        return codes
    low, high = codes & 15, codes >> 4
    apart = np.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)
    return apart if tensor.format.element == 'e2m1' else (apart ^ 8).astype(np.int8) - 8


def assert_formulas(weights, form):
    found, numbers = _quantized(weights, form)
    for weight, tensor, number in zip(weights, found, numbers, strict=True):
        codes, scale, second, dequantized = expected(np.asarray(weight), form)
        np.testing.assert_array_equal(codes_in(tensor).view(np.uint8), codes.view(np.uint8))
        np.testing.assert_array_equal(np.asarray(tensor.scale).view(np.uint8), np.asarray(scale).view(np.uint8))
        assert tensor.scale_2 is None if second is None else np.asarray(tensor.scale_2).item() == second
        np.testing.assert_array_equal(np.asarray(number), dequantized.astype(weight.dtype))


def drawn(shape, dtype, seed, spread=3.0):
    """Weights whose rows and columns are of different sizes, with a block of zeros and outliers."""
    random = np.random.default_rng(seed)
    rows, columns = (np.exp(random.uniform(-spread, spread, n)) for n in shape)
    weight = random.standard_t(3, shape) * rows[:, None] * columns
    weight[:128, :128] = 0 if shape[0] > 1 else weight[:128, :128]
    return weight.astype(dtype)


@pytest.mark.parametrize('name', ALL)
def test_codes_and_scales_are_those_of_the_formulas(name):
    weights = [drawn(shape, dtype, 0) for shape in SHAPES for dtype in (np.float32, ml_dtypes.bfloat16)]
    assert_formulas(weights, ALL[name])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(-120, 80),
    spread=st.floats(0, 12),
    shape=st.sampled_from([(34, 48), (1, 18)]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_any_size_of_weights(seed, size, spread, shape, dtype):
    weight = np.clip(drawn(shape, np.float64, seed, spread) * 2.0**size, -3e38, 3e38)
    # What is below the least normal number, and scales below it, count as zero in XLA on CPU: none of these.
    weight = np.where(np.abs(weight) < 2.0**-100, 0, weight).astype(dtype)
    for form in ANY_SIZE:
        assert_formulas([weight], form)


@pytest.mark.parametrize(
    'form',
    [FORMATS['mxfp8'], FORMATS['fp8_block_ue8m0'], Format('e4m3', 8, 12, 'e8m0')],
    ids=('mxfp8', 'block', 'ue8m0'),
)
@pytest.mark.parametrize('size', [-112, -117, -120, -124])
def test_powers_of_two_of_the_smallest_weights(form, size):
    """amax / 448 is below the least normal number, the power of two above it need not be."""
    weight = np.random.default_rng(size + 200).normal(size=(34, 64)) * 2.0**size
    weight = np.where(np.abs(weight) < 2.0**-126, 0, weight).astype(np.float32)
    tensor = _quantized([weight], form)[0][0]
    codes, scale, *_ = expected(weight, form)
    np.testing.assert_array_equal(np.asarray(tensor.scale), scale)
    np.testing.assert_array_equal(codes_in(tensor).view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize('name', FORMATS)
def test_no_finite_weight_gives_nan(name):
    form = FORMATS[name]
    extremes = np.zeros((4, 64), np.float32)
    extremes[0, :4] = 3e38, -3e38, 1e-45, 1
    extremes[1, :3] = 1e-45, -1e-40, 1.2e-38
    extremes[2] = 1e-37
    weights = [extremes, np.zeros((4, 64), np.float32), np.full((4, 64), 2.0**-130, np.float32)]
    found, numbers = _quantized(weights, form)
    # A power of two above 3e38 / 448 times a code that was rounded up may be beyond float32; it is not NaN.
    assert not any(np.isnan(np.asarray(number)).any() for number in numbers)
    assert all(np.isfinite(np.asarray(number)).all() for number in numbers[1:])
    assert not np.asarray(numbers[1]).any()
    assert all(np.isfinite(np.asarray(tensor.scale).astype(np.float32)).all() for tensor in found)


def test_ties_go_to_even_and_saturate():
    """The middles between E2M1's numbers, with a scale of 1: the largest value of the block is 6."""
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    weight = np.array([[*middles, *(-m for m in middles)]], np.float32)
    tensor = quantize(jnp.asarray(weight), Format('e2m1', 1, 16, scale='e8m0'))
    assert np.asarray(dequantize(tensor)).tolist() == [
        [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -4, -6],
    ]
    clipped = quantize(jnp.asarray(weight), Format('int8', 1), amax=jnp.full((1, 1), 1.0))
    assert np.abs(np.asarray(clipped.codes)).max() == 127


def test_stacks_are_quantized_matrix_by_matrix():
    weight = np.stack([drawn((34, 48), np.float32, seed) for seed in range(6)]).reshape(2, 3, 34, 48)
    for form in (FORMATS['nvfp4'], FORMATS['fp8_tensor'], Format('e4m3', 16, 16)):
        whole = quantize(weight, form)
        assert whole.shape == weight.shape
        assert whole.scale.shape == form.scales_of(weight.shape)
        for place in np.ndindex(2, 3):
            codes, scale, second, _ = expected(weight[place], form)
            one = jax.tree.map(lambda leaf, at=place: leaf[at], whole)
            np.testing.assert_array_equal(codes_in(one).view(np.uint8), codes.view(np.uint8))
            np.testing.assert_array_equal(np.asarray(one.scale).view(np.uint8), np.asarray(scale).view(np.uint8))
            assert second is None or np.asarray(one.scale_2).item() == second


def test_factors_are_divided_out_and_belong_to_the_inputs():
    weight, factor = drawn((8, 32), np.float32, 3), np.exp(np.linspace(-2, 2, 32)).astype(np.float32)
    tensor = quantize(weight, FORMATS['int8'], input_factor=jnp.asarray(factor))
    numbers = expected(weight / factor, FORMATS['int8'])[-1]
    np.testing.assert_array_equal(np.asarray(dequantize(tensor)), numbers)
    np.testing.assert_array_equal(np.asarray(dense(tensor)), numbers * factor)


def test_bits_count_the_scales():
    assert FORMATS['fp8_block'].bits((256, 256)) == 8 + 32 * 4 / 256**2
    assert FORMATS['nvfp4'].bits((256, 256)) == 4 + 8 / 16 + 32 / 256**2
    assert FORMATS['mxfp8'].bits((64, 64)) == 8 + 8 / 32
    assert FORMATS['int4_weights'].bits((1, 256)) == 4 + 32 / 128
    assert FORMATS['w4a8'].bits((2, 256)) == 4 + 32 / 128 + 32 / 512


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'element': 'e5m2'}, 'element'),
        ({'element': 'int8', 'scale': 'e8m0'}, "element='int8'"),
        ({'element': 'e4m3', 'scale': 'e4m3'}, "element='e2m1'"),
        ({'element': 'e4m3', 'inputs': 'block'}, 'columns=0'),
        ({'element': 'int4', 'inputs': 'token'}, 'int4'),
        ({'element': 'int4', 'scale': 'e8m0'}, "expected scale='float32'"),
        ({'element': 'e4m3', 'scale': 'e4m3_grid'}, "element='int4'"),
        ({'element': 'int4', 'columns': 128, 'scale': 'e4m3_grid', 'inputs': 'block'}, "'tensor' or 'token'"),
        ({'element': 'e4m3', 'rows': -1}, 'rows=-1'),
        ({'element': 'e4m3', 'input_columns': 64}, "input_columns=64 with inputs='as_they_are'"),
        (
            {'element': 'e2m1', 'columns': 16, 'scale': 'e4m3', 'inputs': 'block', 'input_columns': 32},
            'input_columns=32',
        ),
        ({'element': 'e4m3', 'width': 3}, 'width'),
        ('fp9', 'fp9'),
    ],
)
def test_formats_that_are_refused(fields, words):
    with pytest.raises(ValueError, match=f'recipe.1.*{words}'):
        format_of(fields, 'recipe.1')


def test_weights_that_are_refused():
    with pytest.raises(ValueError, match='even'):
        quantize(jnp.ones((4, 33)), FORMATS['nvfp4'])
    with pytest.raises(TypeError, match='int32'):
        quantize(jnp.ones((4, 32), jnp.int32), FORMATS['fp8_block'])
