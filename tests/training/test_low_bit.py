"""Moments in 8 and 16 bits: error bounds, absence of bias, and averages that do not get stuck."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.training import low_bit

ONE_LEVEL = 2 ** (1 / 8) - 1  # relative distance of neighbouring codes
SALTS = np.arange(64, dtype=np.uint32) * 7919


def _values(signed: bool, shape=(4, 8, 512)) -> np.ndarray:
    rng = np.random.default_rng(3)
    values = rng.normal(size=shape) * np.exp(rng.normal(size=shape) * 2)
    return (values if signed else np.square(values)).astype(np.float32)


@pytest.fixture(scope='module')
def round_trip():
    """One compiled program: the values read back from every salt given."""

    def run(value, like, salts):
        return jax.vmap(lambda salt: low_bit.load(low_bit.store(value, like, salt), jnp.float32))(salts)

    return jax.jit(run)


@pytest.mark.parametrize('signed', [True, False])
def test_int8_is_within_one_level_and_right_on_average(signed, round_trip):
    value = _values(signed)
    like = low_bit.zeros(value.shape, jnp.float32, 'int8', signed)
    assert like.codes.shape == value.shape
    assert like.codes.dtype == jnp.uint8
    assert like.scale.shape == (4, 8, 2)
    back = np.asarray(round_trip(value, like, SALTS), np.float64)
    blocks = np.abs(value).reshape(4, 8, 2, 256)
    in_range = (blocks > blocks.max(-1, keepdims=True) * 2.0 ** (-15.7 if signed else -31.8)).reshape(value.shape)
    assert in_range.mean() > 0.9
    error = ((back - value) / np.abs(value))[:, in_range]
    assert np.abs(error).max() <= 1.001 * ONE_LEVEL
    # One rounding is off by at most level / 2 in standard deviation, the mean of 64 by an eighth of that.
    assert abs(error.mean()) < 1e-3
    assert np.abs(error.mean(0)).max() < 6 * ONE_LEVEL / 2 / 8
    np.testing.assert_allclose(np.abs(back[0]).reshape(4, 8, 2, 256).max(-1), blocks.max(-1), rtol=1e-6)


def test_tiny_values_of_a_second_moment_never_become_zero(round_trip):
    value = np.full((4, 8, 512), 1e-20, np.float32)
    value[..., 0] = 1.0
    value[1:] = 0.0
    like = low_bit.zeros(value.shape, jnp.float32, 'int8', signed=False)
    back = np.asarray(round_trip(value, like, SALTS))
    assert back[:, 0, :, :256].min() == pytest.approx(2 ** (-255 / 8), rel=1e-5)
    np.testing.assert_allclose(back[:, 0, :, 256:], 1e-20, rtol=1e-5)
    assert not back[:, 1:].any()


def test_bfloat16_rounds_to_a_neighbour_and_right_on_average(round_trip):
    value = _values(True)
    like = low_bit.zeros(value.shape, jnp.float32, 'bfloat16', True)
    back = np.asarray(round_trip(value, like, SALTS), np.float64)
    assert (np.abs(back - value) <= 2**-7 * np.abs(value)).all()
    assert abs(((back.mean(0) - value) / np.abs(value)).mean()) < 1e-5


@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
def test_a_slow_average_follows_its_input(precision):
    """b2=0.999 from 4 down to 1: rounding to nearest would stay at 4 (a step is 0.1 % of the value)."""
    like = low_bit.zeros((16, 256), jnp.float32, precision, signed=False)

    def step(moment, count):
        value = 0.999 * low_bit.load(moment, jnp.float32) + 0.001
        return low_bit.store(value, moment, low_bit.salt(count, 5)), None

    start = low_bit.store(jnp.full((16, 256), 4.0), like, jnp.uint32(0))
    end, _ = jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(1500)))(start)
    values = np.asarray(low_bit.load(end, jnp.float32))
    assert values.mean() == pytest.approx(1 + 3 * 0.999**1500, rel=0.05)
    assert values.std() / values.mean() < 0.3


@pytest.mark.parametrize(
    ('last', 'block'),
    [(4096, 256), (11008, 256), (896, 224), (1152, 192), (50257, None), (64, 64), (33, 33), (31, None)],
)
def test_block_size_is_the_largest_divisor(last, block):
    assert low_bit.block_size((7, last)) == block


def test_what_does_not_divide_or_is_small_stays_exact():
    assert low_bit.zeros((64, 50257), jnp.float32, 'int8', True).dtype == jnp.float32
    assert low_bit.zeros((4, 256), jnp.float32, 'int8', True).dtype == jnp.float32
    assert low_bit.zeros((4, 256), jnp.float32, 'bfloat16', True).dtype == jnp.float32
    assert low_bit.zeros((64, 50257), jnp.float32, 'bfloat16', True).dtype == jnp.bfloat16
    assert low_bit.zeros((), jnp.float32, 'int8', True).shape == ()
