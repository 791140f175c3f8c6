"""Moments in 8 and 16 bits: error bounds, absence of bias, and averages that do not get stuck."""

import functools

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


@functools.partial(jax.jit, static_argnames=('precision', 'signed'))
def _round_trip(value, salts, precision, signed):
    """What is written first, and the values read back from every salt."""
    like = low_bit.zeros(value.shape, jnp.float32, precision, signed)
    written = jax.vmap(lambda salt: low_bit.store(value, like, salt))(salts)
    return written, jax.vmap(lambda moment: low_bit.load(moment, jnp.float32))(written)


@pytest.mark.parametrize('signed', [True, False])
def test_int8_is_within_one_level_and_right_on_average(signed):
    value = _values(signed)
    written, back = _round_trip(value, SALTS, 'int8', signed)
    assert written.codes.shape == (64, *value.shape)
    assert written.codes.dtype == jnp.uint8
    assert written.scale.shape == (64, 4, 8, 2)
    back = np.asarray(back, np.float64)
    blocks = np.abs(value).reshape(4, 8, 2, 256)
    in_range = (blocks > blocks.max(-1, keepdims=True) * 2.0 ** (-15.7 if signed else -31.8)).reshape(value.shape)
    assert in_range.mean() > 0.9
    error = ((back - value) / np.abs(value))[:, in_range]
    assert np.abs(error).max() <= 1.001 * ONE_LEVEL
    # One rounding is off by at most level / 2 in standard deviation, the mean of 64 by an eighth of that.
    assert abs(error.mean()) < 1e-3
    assert np.abs(error.mean(0)).max() < 6 * ONE_LEVEL / 2 / 8
    np.testing.assert_allclose(np.abs(back[0]).reshape(4, 8, 2, 256).max(-1), blocks.max(-1), rtol=1e-6)


def test_tiny_values_of_a_second_moment_never_become_zero():
    value = np.full((4, 8, 512), 1e-20, np.float32)
    value[..., 0] = 1.0
    value[1:] = 0.0
    back = np.asarray(_round_trip(value, SALTS, 'int8', False)[1])
    assert back[:, 0, :, :256].min() == pytest.approx(2 ** (-255 / 8), rel=1e-5)
    np.testing.assert_allclose(back[:, 0, :, 256:], 1e-20, rtol=1e-5)
    assert not back[:, 1:].any()


def test_bfloat16_rounds_to_a_neighbour_and_right_on_average():
    value = _values(True)
    back = np.asarray(_round_trip(value, SALTS, 'bfloat16', True)[1], np.float64)
    assert (np.abs(back - value) <= 2**-7 * np.abs(value)).all()
    assert abs(((back.mean(0) - value) / np.abs(value)).mean()) < 1e-5


@pytest.mark.parametrize('precision', ['bfloat16', 'int8'])
def test_a_slow_average_follows_its_input(precision):
    """b2=0.999 from 4 down to 1: rounding to nearest would stay at 4 (a step is 0.1 % of the value)."""

    def step(moment, count):
        value = 0.999 * low_bit.load(moment, jnp.float32) + 0.001
        return low_bit.store(value, moment, low_bit.salt(count, 5)), None

    @jax.jit
    def run(start):
        like = low_bit.zeros(start.shape, jnp.float32, precision, signed=False)
        end, _ = jax.lax.scan(step, low_bit.store(start, like, jnp.uint32(0)), jnp.arange(1500))
        return low_bit.load(end, jnp.float32)

    values = np.asarray(run(np.full((16, 256), 4.0, np.float32)))
    assert values.mean() == pytest.approx(1 + 3 * 0.999**1500, rel=0.05)
    assert values.std() / values.mean() < 0.3


@pytest.mark.parametrize(
    ('last', 'block'),
    [(4096, 256), (11008, 256), (896, 224), (1152, 192), (50257, None), (64, 64), (33, 33), (31, None)],
)
def test_block_size_is_the_largest_divisor(last, block):
    assert low_bit.block_size((7, last)) == block


def test_what_does_not_divide_or_is_small_stays_exact():
    def dtype(shape, precision):
        return jax.eval_shape(lambda: low_bit.zeros(shape, jnp.float32, precision, True)).dtype

    assert dtype((64, 50257), 'int8') == jnp.float32
    assert dtype((4, 256), 'int8') == jnp.float32
    assert dtype((4, 256), 'bfloat16') == jnp.float32
    assert dtype((64, 50257), 'bfloat16') == jnp.bfloat16
    assert dtype((), 'int8') == jnp.float32
