"""Flag presets: accepted by the installed jaxlib, added to what the user has, refused when it is too late."""

import os
import subprocess
import sys

import jax
import pytest

from jpt.training import xla_flags
from jpt.training.xla_flags import PRESETS, set_xla_flags

PROGRAM = """
import os, jax
from jpt.training.xla_flags import PRESETS, set_xla_flags
for preset in PRESETS:
    print(set_xla_flags(preset))
assert len(jax.devices()) == 2
try:
    set_xla_flags('overlap')
except RuntimeError as error:
    print(error)
"""


def test_the_jaxlib_accepts_every_flag_and_the_backend_must_not_have_started():
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    done = subprocess.run([sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith('XLA flags (overlap): --xla_force_host_platform_device_count=2 --xla_gpu_enable_lat')
    assert lines[-1] == "compute.xla_flags='overlap' comes too late: JAX has started its backend already"
    assert all(flag in lines[-2] for flags in PRESETS.values() for flag in flags)


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setattr(xla_flags.xla_bridge, 'backends_are_initialized', lambda: False)
    environment = {'XLA_FLAGS': '--xla_gpu_deterministic_ops=false'}
    assert set_xla_flags('deterministic', environment) == (
        'XLA flags (deterministic): --xla_gpu_deterministic_ops=false'
    )
    assert set_xla_flags(None, {}) == 'XLA flags: none'
    with pytest.raises(ValueError, match=r"compute\.xla_flags='fast': expected None or one of overlap, fsdp"):
        set_xla_flags('fast', environment)


def test_this_process_has_started_its_backend():
    jax.devices()
    with pytest.raises(RuntimeError, match='comes too late'):
        set_xla_flags('fsdp', {})
