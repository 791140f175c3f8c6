"""Every test runs on eight virtual CPU devices, with rank promotion an error."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# The programs of the tests are tiny: little optimization, and a cache for the next run of the suite.
QUICK = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
PATIENT = '--xla_cpu_collective_call_terminate_timeout_seconds=600'  # a busy machine is not a deadlock
# Collectives between virtual devices block a thread each, and XLA may start two at once on a device: with one thread
# per device, half of the devices can wait in one collective and half in the other for ever.
os.environ['PJRT_NPROC'] = '32'
DEVICES = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES} {QUICK} {PATIENT}'

import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
ROOT = pathlib.Path(__file__).resolve().parents[1]
jax.config.update('jax_compilation_cache_dir', str(ROOT / '.pytest_cache' / 'jax'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

SHARED = ROOT.parent / 'shared'
MAPS = pathlib.Path('/proc/self/maps')
MOST_MAPS = 20_000


@pytest.fixture(scope='module', autouse=True)
def room_for_programs():
    """Frees compiled programs between modules when there are many: each has several memory maps, of which Linux gives a
    process 65,530; beyond them XLA crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b'\n') > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
    """The folder of real corpora and small pretrained models, beside the checkout; skips where it is absent."""
    if not (SHARED / 'data').is_dir():
        pytest.skip('the folder ../shared/data is not on this machine')
    return SHARED / 'data'
