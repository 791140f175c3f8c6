"""Every test runs on eight virtual CPU devices, with rank promotion an error."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
    """The folder of real corpora and small pretrained models, beside the checkout; skips where it is absent."""
    if not (SHARED / 'data').is_dir():
        pytest.skip('the folder ../shared/data is not on this machine')
    return SHARED / 'data'
