"""The exchange of tokens between experts, compiled for eight H100 without one: what travels, forward and backward."""

import functools
import importlib.util
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.kernels.expert_parallel import LATE, SPECS, mixture
from jpt.sharding.audit import collectives
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.topology import PLUGINS, topology_devices

if not any(importlib.util.find_spec(name) for name in PLUGINS) and 'JPT_AOT' not in os.environ:
    pytest.skip("compiling for GPUs needs the extra 'aot'", allow_module_level=True)

B, T, J, D, F, E = 8, 64, 2, 128, 256, 8
SHARDS = 4
ROWS = B * T * J // 8  # of a device
ROOM = ROWS * 3 // 2  # what reaches a shard in a round: half as much again as an even share
RAGGED, PADDED = 'ragged-all-to-all', 'all-to-all'
MOVED = (RAGGED, PADDED, 'all-gather')


def experts(kernels, rows):
    """Any products will do: what experts make of their rows moves nothing."""
    return jax.nn.silu(rows.x_MD @ kernels['up'][0].T) @ kernels['down'][0].T


@functools.cache
def compiled(exchange):
    """The text of a program with value and gradients of a mixture in bfloat16; tokens lie over fsdp and expert."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=SHARDS), topology_devices(8))

    def step(x, ids, weights, kernels, dy):
        y, pull = jax.vjp(lambda x, w, k: mixture(experts, x, ids, w, k, E, exchange=exchange)[0], x, weights, kernels)
        return y, pull(dy)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    token = P(('fsdp', 'expert'))
    x, ids = array((B, T, D), jnp.bfloat16, token), array((B, T, J), jnp.int32, token)
    shapes = {'up': (E, F, D), 'down': (E, D, F)}
    kernels = {name: array(shape, jnp.bfloat16, SPECS[name]) for name, shape in shapes.items()}
    with jax.set_mesh(mesh):
        traced = jax.jit(step).trace(x, ids, array((B, T, J), jnp.bfloat16, token), kernels, x)
        return traced.lower().compile().as_text()


def first_round(text):
    """Collectives of a program but those of further rounds, which an even router does not run."""
    lines = text.splitlines()
    return [item for item in collectives('\n'.join(line for line in lines if LATE not in line)) if item.kind in MOVED]


def test_ragged_sends_the_rows_that_must_travel_and_gathers_a_few_counts():
    text = compiled('ragged')
    found = first_round(text)
    gathered = [item for item in found if item.kind == 'all-gather']
    assert {(item.dtype, math.prod(item.shapes[0])) for item in gathered} == {('s32', SHARDS * E)}
    moved = [item for item in found if item.kind != 'all-gather']
    assert {(item.kind, item.dtype, item.group) for item in moved} == {(RAGGED, 'bf16', SHARDS)}
    assert all(item.members == (0, 1, 2, 3) for item in found), 'along expert alone'
    # There and back, and the same backward: what arrives at a shard, and what comes home.
    assert sorted(item.shapes[0] for item in moved) == [(ROWS, D)] * 2 + [(ROOM, D)] * 2
    assert all(item.bytes == 2 * math.prod(item.shapes[0]) for item in moved)
    assert not re.search(rf'\w+\[{SHARDS * ROWS},', text), 'rows of all shards'


def test_further_rounds_are_in_two_branches_that_an_even_router_does_not_take():
    """There and back; in the backward pass there, and both ways for gradients (what comes back is not asked for)."""
    text = compiled('ragged')
    assert len(re.findall(rf' {RAGGED}(?:-start)?\(', text)) == 4 + 2 + 3
    assert sum(' conditional(' in line and LATE in line for line in text.splitlines()) == 2


def test_padded_sends_blocks_of_one_size():
    moved = [item for item in first_round(compiled('padded')) if item.kind != 'all-gather']
    assert {(item.kind, item.shapes) for item in moved} == {(PADDED, ((SHARDS, ROOM // SHARDS, D),))}
    assert len(moved) == 4
