"""Programs compiled for GPUs that are not here cannot be read back from the compilation cache: compile them anew."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def no_compilation_cache():
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()
    yield
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()
