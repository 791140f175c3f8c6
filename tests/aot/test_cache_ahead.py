"""A cache in eight bits as XLA compiles a step from it for an H100: read as it is, with no copy in another dtype."""

import importlib.util
import os

import jax.numpy as jnp
import pytest
from ahead import compiled

from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.cached_attention import cached_attention
from jpt.kernels.masks import Mask, Places
from jpt.sharding.topology import PLUGINS

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

B, N, K, H, S = 8, 32, 8, 128, 4096


def step(q_BTNH, k_BKHS, v_BKSH, *scales):
    """One new token of every row, over a full cache."""
    slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    places = Places(slots[:, -1:], slots, jnp.ones((B, 1), jnp.int32), jnp.ones((B, S), jnp.int32))
    return cached_attention(q_BTNH, k_BKHS, v_BKSH, places, Scores(Mask(), H**-0.5), None, *scales)


def test_codes_are_read_as_they_are():
    sizes = {}
    for dtype, scales in (('bfloat16', ()), ('float8_e4m3fn', (((), 'float32'),) * 2)):
        shapes = ((B, 1, N, H), 'bfloat16'), ((B, K, H, S), dtype), ((B, K, S, H), dtype)
        memory = compiled(step, *shapes, *scales).memory_analysis()
        sizes[dtype] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    (wide, temporary), (narrow, of_codes) = sizes.values()
    assert narrow < 0.51 * wide
    assert of_codes < B * K * H * S / 4  # a copy of keys or values in bfloat16 has eight times as much
    assert of_codes <= 1.1 * temporary
