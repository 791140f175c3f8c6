"""The moving average against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np

from jpt.training.ema import averaged, init_ema, update_ema


def test_average_follows_the_recurrence_and_keeps_float32():
    params = {'w': np.asarray([1.0, 2.0], jnp.bfloat16), 'hole': None}
    ema = jax.jit(init_ema)(params)
    assert ema['w'].dtype == jnp.float32
    update = jax.jit(update_ema, static_argnums=2)
    expected = np.asarray([1.0, 2.0])
    for count in range(1, 6):
        params = {'w': np.asarray([count, 2.0 * count], jnp.bfloat16), 'hole': None}
        ema = update(ema, params, 0.3, np.int32(count))
        decay = min(0.3, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * np.asarray([1.0, 2.0]) * count
    np.testing.assert_allclose(ema['w'], expected, rtol=1e-6)
    assert ema['hole'] is None


def test_the_average_has_the_dtypes_of_the_parameters():
    params = {'w': np.asarray([1.0, 3.0], jnp.bfloat16), 'hole': None}
    mean = averaged({'w': np.asarray([1.001, 2.0], np.float32), 'hole': None}, params)
    assert (mean['w'].dtype, mean['w'].tolist(), mean['hole']) == (jnp.bfloat16, [1.0, 2.0], None)
    assert averaged(None, params) is params


def test_a_constant_is_its_own_average():
    params = {'w': np.full((3,), 0.1, np.float32)}
    ema = jax.jit(lambda params, count: update_ema(init_ema(params), params, 0.999, count))(params, np.int32(1))
    np.testing.assert_array_equal(ema['w'], params['w'])
