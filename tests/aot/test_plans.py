"""Training steps compiled for eight H100 without a GPU: what they send, and what they need.

Needs the extra `aot`. Without it these tests are skipped, unless JPT_AOT says that they must run.
"""

import importlib.util
import os

import pytest

from jpt.config import config_dict, from_config_dict
from jpt.plan import describe, plan_step
from jpt.sharding.topology import H100, PLUGINS, target_config, topology_devices
from jpt.training.settings import TrainConfig

VOCAB = 1003  # padded to a multiple of what it is divided by
ARCHITECTURE = {
    'model_type': 'qwen3',
    'vocab_size': VOCAB,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 4,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 16,
    'max_position_embeddings': 512,
    'tie_word_embeddings': False,
}
needs_plugin = pytest.mark.skipif(
    'JPT_AOT' not in os.environ and not any(importlib.util.find_spec(name) for name in PLUGINS),
    reason="the CUDA plugin is not installed: pip install -e '.[aot]'",
)


def planned(mesh, microbatches=1):
    values = {
        'task': 'sft',
        'model': {'architecture': ARCHITECTURE},
        'data': {'paths': ('talk.jsonl',), 'kind': 'chat'},
        'batch': {'size': 64, 'length': 64, 'microbatches': microbatches},
        'compute': {'dtype': 'bfloat16', 'remat': 'full'},
        'mesh': {'data': 1, **mesh},
    }
    return plan_step(from_config_dict(TrainConfig, config_dict(TrainConfig, values), 'config'), topology_devices(8))


@needs_plugin
@pytest.mark.parametrize('mesh', [{'tensor': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_logits_are_never_gathered(mesh):
    """No all-gather gives an array [..., V], whole or a shard; tables [V, D] are gathered over fsdp, as weights are."""
    found = planned(mesh).traffic
    assert found
    gathered = [shape for item in found if item.kind == 'all-gather' for shape in item.shapes]
    assert not [shape for shape in gathered if shape[-1] >= VOCAB // mesh['tensor']]
    assert bool(gathered) == ('fsdp' in mesh)


@needs_plugin
def test_gradients_are_reduced_once_however_many_microbatches():
    """Data parallelism alone: float32 sums over eight devices, as many bytes with 4 microbatches as with 1."""

    def reduced(microbatches):
        found = planned({'data': 8}, microbatches).traffic
        sums = [item for item in found if item.kind in ('all-reduce', 'reduce-scatter')]
        assert all('bf16' not in item.dtype for item in sums)
        return sum(item.times * item.bytes for item in sums)

    once = reduced(1)
    assert reduced(4) == pytest.approx(once, abs=64)  # a few scalars
    parameters = 2 * VOCAB * 64 + 4 * (64 * (128 + 64 + 64 + 128 + 3 * 96) + 2 * 64 + 2 * 16) + 64
    assert 4 * parameters <= once <= 4.1 * parameters


@needs_plugin
def test_a_pipeline_needs_no_more_memory_for_more_microbatches():
    """1F1B holds the inputs of as many microbatches as there are stages, not of all of them; rows per one are equal."""
    few = planned({'pipe': 4, 'data': 2}, 4)
    many = planned({'pipe': 4, 'data': 2}, 16)
    assert many.temporary <= 1.1 * few.temporary
    permuted = {item.kind for item in few.traffic}
    assert 'collective-permute' in permuted
    text = describe(few, H100)
    assert 'pipe=4' in text
    assert 'fits' in text


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
