"""Training steps compiled for eight H100 without a GPU: what they send, and what they need.

Needs the extra `aot`. Without it these tests are skipped, unless JPT_AOT says that they must run. Models are tiny but
for one: Qwen3-8B, whose layers are scanned, takes hardly longer to compile. More meshes: .ci/full.
"""

import functools
import importlib.util
import math
import os
from pathlib import Path

import pytest

from jpt.config import from_config_dict
from jpt.plan import FRACTION, describe, fits
from jpt.planned import plan_step
from jpt.sharding.audit import summed
from jpt.sharding.topology import H100, PLUGINS, target_config, topology_devices
from jpt.training.memory import bytes_per_device
from jpt.training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
SMALL = 64  # bytes of a few scalars
needs_plugin = pytest.mark.skipif(
    'JPT_AOT' not in os.environ and not any(importlib.util.find_spec(name) for name in PLUGINS),
    reason="the CUDA plugin is not installed: pip install -e '.[aot]'",
)


def benchmark(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plans, sizes, long_rows = benchmark('plans'), benchmark('real_sizes'), benchmark('long_rows')
VOCAB, WIDTH = plans.ARCHITECTURE['vocab_size'], plans.ARCHITECTURE['hidden_size']
# Embedding and head; four layers of q, k, v, out, gate, up, down, two norms of the width, two of a head; the last norm.
PARAMETERS = 2 * VOCAB * WIDTH + 4 * (WIDTH * (4 * 128 + 3 * 96) + 2 * WIDTH + 2 * 16) + WIDTH

GATHER, REDUCE, SCATTER, PASS = 'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute'
# What every mesh must send, over which axes; what is small (a norm, a count) is left out.
EXPECTED = {
    'data=8': {'data': {REDUCE}},
    'fsdp=8': {'fsdp': {GATHER, SCATTER, REDUCE}},
    'tensor=8': {'tensor': {REDUCE}},
    'context=8': {'context': {PASS, REDUCE}},
    'pipe=4 data=2': {'pipe': {PASS, REDUCE}, 'data': {REDUCE}},
    'data=2 fsdp=2 tensor=2': {
        'data': {REDUCE},
        'fsdp': {GATHER, SCATTER},
        'tensor': {REDUCE},
        'data+fsdp': {REDUCE},
    },
    'pipe=2 fsdp=2 tensor=2': {
        'pipe': {PASS, REDUCE},
        'fsdp': {GATHER, SCATTER, REDUCE},
        'tensor': {REDUCE},
        'pipe+tensor': {REDUCE},
    },
}
OTHERS = tuple(name for name in map(plans.name_of, plans.MESHES) if name not in EXPECTED)


@functools.cache
def planned(name, microbatches=4):
    """One compile per mesh, shared by the tests; 16 rows per microbatch."""
    return plans.tiny({axis: int(size) for axis, size in (part.split('=') for part in name.split())}, microbatches)


def check_tables_and_logits(plan):
    """No all-gather gives an array with the vocabulary, but the tables [V, D] themselves, as weights, over fsdp."""
    sizes = dict(plan.job.mesh.shape)
    shard = VOCAB // (sizes['tensor'] * sizes['pipe'])
    for item in plan.traffic:
        if item.kind == GATHER:
            assert 'bf16' in item.dtype
            wide = [shape for shape in item.shapes if max(shape) >= shard]
            assert all(len(shape) == 2 and min(shape) == WIDTH and max(shape) < shard + 8 for shape in wide), wide
            assert sizes['fsdp'] > 1
            assert item.group == sizes['fsdp'], 'a weight is gathered over fsdp alone'


def check_reductions(plan):
    """Every gradient is summed in float32; over data and context outside of the loops, once per step."""
    rows = summed([item for item in plan.traffic if item.bytes > SMALL], dict(plan.job.mesh.shape))
    for row in rows:
        if row.kind in (REDUCE, SCATTER) and not set(row.axes.split('+')) & {'tensor', 'pipe'}:
            assert row.dtype == 'f32'
            if row.kind == REDUCE:
                assert row.times == 1, row


@needs_plugin
@pytest.mark.parametrize('name', EXPECTED)
def test_a_mesh_sends_what_it_must_and_no_logits(name):
    plan = planned(name)
    found = {}
    for row in summed([item for item in plan.traffic if item.bytes > SMALL], dict(plan.job.mesh.shape)):
        found.setdefault(row.axes, set()).add(row.kind)
    assert found == EXPECTED[name]
    check_tables_and_logits(plan)
    check_reductions(plan)


@pytest.mark.full
@needs_plugin
@pytest.mark.parametrize('name', OTHERS)
def test_no_mesh_gathers_logits_or_sums_a_gradient_twice(name):
    check_tables_and_logits(planned(name))
    check_reductions(planned(name))


@needs_plugin
def test_all_gradients_are_summed_by_one_reduction_after_four_microbatches():
    """Data parallelism alone: one all-reduce of a float32 per parameter, and a few scalars, outside of the loop."""
    (large,) = [item for item in planned('data=8').traffic if item.bytes > SMALL]
    assert (large.kind, large.dtype, large.group, large.times) == (REDUCE, 'f32', 8, 1)
    assert PARAMETERS <= sum(map(math.prod, large.shapes)) <= PARAMETERS + 16


@needs_plugin
def test_a_pipeline_needs_no_more_memory_for_64_microbatches_than_for_4():
    """1F1B holds the inputs of as many microbatches as there are stages, not of all; rows per one are equal.

    What may be added is the batch itself: tokens, targets, positions and segments of the device's rows, rearranged.
    """
    few, many = planned('pipe=4 data=2', 4), planned('pipe=4 data=2', 64)
    assert many.parts['batch'] == 16 * few.parts['batch']
    assert few.temporary <= many.temporary <= few.temporary + many.parts['batch']
    assert many.temporary <= 1.2 * few.temporary
    text = describe(few, H100)
    assert f'{100 * 3 / 7:.1f} %     of a step (1f1b, 4 stages, 4 microbatches)' in text


@needs_plugin
def test_experts_exchange_rows_and_nothing_is_gathered_over_their_axis():
    """Four shards of experts, each with eight of 32: rows travel, in bfloat16, only those that must, and nothing else.

    Every gather is one of a weight over fsdp, or of the number of rows of each shard for each expert: neither the
    tokens of all shards [2048, 64] nor the experts of all. (tests/aot/test_exchange_ahead.py has blocks of one size.)
    """
    plan = plans.tiny({'expert': 4, 'fsdp': 2}, architecture=plans.MIXTURE, exchange='ragged')
    shards, layers, width = plan.job.mesh.shape['expert'], 4, 48
    tokens = 16 * plans.LENGTH // 8  # of a device
    rows = 4 * tokens  # four experts per token
    room = rows * 3 // 2  # half as much again as the even share of a shard
    moved = [item for item in plan.traffic if item.kind == 'ragged-all-to-all']
    assert {(item.dtype, item.group) for item in moved} == {('bf16', shards)}
    # There and back: forward, recomputed, backward.
    for count in (room, rows):
        assert sum(item.times for item in moved if item.shapes == ((count, WIDTH),)) == 3 * layers
    assert sum(item.times for item in moved) == 6 * layers
    assert not [item for item in plan.traffic if item.kind == 'all-to-all']
    heads = 8 * 16
    weights = {(VOCAB, WIDTH), (heads, WIDTH), (WIDTH, heads), (8, width, WIDTH), (8, WIDTH, width)}
    for item in plan.traffic:
        if item.kind == GATHER and item.group == shards:
            assert (item.dtype, item.shapes) == ('s32', ((shards, 32),)), 'counts'
        elif item.kind == GATHER:
            assert set(item.shapes) <= weights
            assert item.members == (0, 4), 'a weight is gathered over fsdp alone'
    # Gradients of experts' kernels are summed over fsdp, and not over the axis that divides the experts.
    dense = 2 * VOCAB * WIDTH // 2 + layers * 4 * WIDTH * heads // 2
    over_experts = [item for item in plan.traffic if item.kind == REDUCE and item.group == shards]
    assert sum(item.bytes * item.times for item in over_experts if item.dtype == 'f32') == 4 * dense


@needs_plugin
@pytest.mark.parametrize('width', [1024, 1152])
def test_training_in_fp8_gathers_codes(width):
    """A byte per weight and a float32 per block of them, for each pass; the tables [V, D] alone travel in bfloat16.

    A quarter of 1,152 ends within a block: there scales do not travel, but the largest values of blocks.
    """
    heads, mlp, layers, passes = 8 * 128, 1280, 2, 2
    sizes = {'hidden_size': width, 'intermediate_size': mlp, 'num_hidden_layers': layers, 'head_dim': 128}
    blocks = {'recipe': (('layers/**', 'fp8_block'),), 'gradients': 'block'}
    mesh = {'fsdp': 4, 'tensor': 2}
    plan = plans.tiny(mesh, architecture=plans.ARCHITECTURE | sizes, quantize=blocks)
    gathers = [item for item in plan.traffic if item.kind == GATHER and item.bytes > SMALL]
    assert {item.group for item in gathers} == {mesh['fsdp']}
    codes = [item for item in gathers if 'f8e4m3fn' in item.dtype]
    weights = width * (4 * heads + 3 * mlp) // mesh['tensor']  # of a layer, on a device
    of_blocks, whole = 4 * weights // 128**2, width % (128 * mesh['fsdp']) == 0
    assert sum(item.times * item.bytes for item in codes) == layers * passes * (weights + whole * of_blocks)
    reduced = [item for item in plan.traffic if item.kind == REDUCE and item.bytes == of_blocks]
    assert sum(item.times for item in reduced) == (0 if whole else layers * passes)
    tables = [item for item in gathers if item not in codes]
    assert {item.dtype for item in tables} == {'bf16'}
    assert all(width in shape for item in tables for shape in item.shapes)


@needs_plugin
@pytest.mark.full
@pytest.mark.parametrize('name', sizes.BY_NAME)
def test_published_models_fit_as_the_table_says(name):
    config = from_config_dict(TrainConfig, sizes.get_config(name), 'config')
    plan = plan_step(config, topology_devices(sizes.BY_NAME[name].gpus))
    assert fits(plan, H100)
    assert plan.total < FRACTION * H100.memory
    over_experts = {row.kind for row in summed(plan.traffic, dict(plan.job.mesh.shape)) if row.axes == 'expert'}
    assert over_experts == ({'all-to-all', GATHER, REDUCE} if 'expert' in sizes.BY_NAME[name].mesh else set())


# GiB per H100 of a step of Qwen3-8B on 8 x 4,096 tokens; float32 parameters, bfloat16 moments and products, full remat.
TEMPORARIES = {'TP8': 16.5, 'FSDP8': 13.5, 'PP2 x TP4, 8 microbatches': 11.0}
# The largest piece of it: layer inputs held for the backward pass; the float32 gradient of a whole table; of kernels.
LARGEST = {
    'TP8': 36 * 8 * 4096 * 4096 * 2,
    'FSDP8': 151936 * 4096 * 4,
    'PP2 x TP4, 8 microbatches': 18 * 4096 * 12288 // 4 * 4,
}


@needs_plugin
@pytest.mark.parametrize('layout', TEMPORARIES)
def test_qwen3_8b_fits_eight_gpus(layout):
    plan = plans.qwen3_8b(plans.LAYOUTS[layout])
    parameters = 8_190_735_360
    assert plan.parts['params'] == pytest.approx(4 * parameters / 8, rel=1e-3)  # norms are whole on every device
    assert plan.parts['optimizer'] == pytest.approx((2 + 2) * parameters / 8, rel=1e-3)
    assert plan.parts['gradients'] == plan.parts['params']
    assert plan.temporary < TEMPORARIES[layout] * GIB
    assert fits(plan, H100)
    assert plan.total < 80e9
    state = bytes_per_device(plan.job.state)
    assert plan.total - plan.temporary - plan.parts['batch'] == pytest.approx(state, abs=1024)
    assert 'fits in the 75%' in describe(plan, H100)
    largest = plan.buffers[0]
    assert LARGEST[layout] <= largest.bytes < 1.01 * LARGEST[layout], largest


@pytest.mark.parametrize('count', [0, 9, 12])
@needs_plugin
def test_impossible_topologies_are_named(count):
    with pytest.raises(ValueError, match=f'topology={count}'):
        topology_devices(count)


def test_the_target_is_an_h100():
    text = target_config(H100)
    assert 'shared_memory_per_block_optin: 232448' in text
    assert 'major: 9' in text
    assert text.count('{') == text.count('}')


@needs_plugin
@pytest.mark.parametrize('way', long_rows.WAYS)
def test_a_student_of_4b_learns_from_rows_of_32768_tokens_on_one_gpu(way):
    """From 64 recorded words of 248,320 each; the naive float32 logits alone would take 30 GiB."""
    planned = long_rows.planned(way)
    assert planned.total <= FRACTION * H100.memory, {name: size / GIB for name, size in planned.parts.items()}
    words, width = long_rows.WORDS, long_rows.ARCHITECTURE['hidden_size']
    parameters = planned.parts['params'] + planned.parts.get('frozen', 0)
    assert parameters > 2 * words * width + 2 * 36 * 3 * 9728 * width, 'all of the model is there'
