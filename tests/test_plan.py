"""The plan's own arithmetic, without a compile: bubbles by closed forms, verdicts, the compiler's memory report."""

import jax
import pytest

from jpt.config import config_dict, from_config_dict
from jpt.plan import FRACTION, MOST, bounds_of, describe, fits, idle_share, largest, verdict
from jpt.planned import Buffer, Planned, read_buffers, without_late_rounds
from jpt.sharding.audit import Collective
from jpt.sharding.topology import H100, H200
from jpt.training.job import make_job
from jpt.training.memory import bytes_per_device, gradient_bytes
from jpt.training.settings import TrainConfig

GIB = 2**30
ARCHITECTURE = {
    'model_type': 'llama',
    'vocab_size': 64,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 8,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'max_position_embeddings': 64,
    'tie_word_embeddings': True,
}


MIXTURE = {
    **ARCHITECTURE,
    'model_type': 'qwen3_moe',
    'moe_intermediate_size': 40,
    'num_experts': 4,
    'num_experts_per_tok': 2,
}
HYBRID = {
    'model_type': 'nemotron_h',
    'hybrid_override_pattern': 'M-*',
    'vocab_size': 64,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_attention_heads': 2,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'mamba_num_heads': 8,
    'mamba_head_dim': 8,
    'ssm_state_size': 4,
    'n_groups': 2,
}


def job_of(mesh, microbatches=1, architecture=ARCHITECTURE, **compute):
    values = {
        'task': 'pretrain',
        'model': {'architecture': architecture},
        'data': {'paths': ('text.txt',)},
        'batch': {'size': 8 * microbatches, 'length': 8, 'microbatches': microbatches},
        'optimizer': {'moments': 'bfloat16'},
        'compute': compute,
        'mesh': {'data': 1, **mesh},
    }
    return make_job(from_config_dict(TrainConfig, config_dict(TrainConfig, values), 'config'), jax.devices())


@pytest.mark.parametrize(
    ('pipe', 'chunks', 'count', 'schedule'),
    [(2, 1, 4, '1f1b'), (4, 1, 8, 'gpipe'), (4, 1, 5, 'gpipe'), (4, 2, 8, '1f1b'), (2, 4, 2, '1f1b')],
)
def test_bubbles_are_those_of_the_closed_forms(pipe, chunks, count, schedule):
    """(p - 1) / (m + p - 1), and (p - 1) / (v m + p - 1) for v interleaved chunks."""
    job = job_of({'pipe': pipe, 'data': 8 // pipe}, count, pipeline=schedule, chunks=chunks)
    expected = (pipe - 1) / (chunks * count + pipe - 1)
    assert idle_share(job) == pytest.approx(expected, rel=1e-12)
    text = describe(Planned(job, {'params': GIB, 'gradients': GIB, 'rest': 0}, [], []), H100)
    assert f'{100 * expected:.1f} %     of a step ({schedule}, {pipe} stages, {count} microbatches' in text


@pytest.fixture(scope='module')
def flat():
    return job_of({'data': 2, 'fsdp': 4})


def test_without_stages_there_are_no_bubbles(flat):
    assert idle_share(flat) == 0
    text = describe(Planned(flat, {'params': GIB, 'gradients': GIB, 'rest': 0}, [], []), H100)
    assert 'bubbles' not in text
    assert 'collectives: none' in text


def test_gradients_are_wide_and_divided_as_the_parameters(flat):
    params = flat.state.params
    assert gradient_bytes(params) == bytes_per_device(params)  # float32 already
    narrow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, 'bfloat16', sharding=leaf.sharding), params)
    assert bytes_per_device(narrow) * 2 == gradient_bytes(narrow) == gradient_bytes(params)
    assert gradient_bytes(narrow, wide=False) == bytes_per_device(narrow)


@pytest.mark.parametrize(
    ('size', 'expected'),
    [
        (59.0, 'fits in the 75%'),  # of 79.11 GiB: 59.33
        (60.0, 'fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; the default of 0.75 is 59.33 GiB'),
        (75.0, 'fits with'),  # 75.15
        (76.0, 'DOES NOT FIT: at most 75.15 GiB'),
    ],
)
def test_verdict_knows_what_jax_takes(flat, size, expected):
    planned = Planned(flat, {'params': int(size * GIB), 'gradients': 0, 'rest': 0}, [], [])
    assert verdict(planned, H100).startswith(expected)
    assert fits(planned, H100) == (size < 75.15)
    assert fits(planned, H200)
    assert (FRACTION, MOST) == (0.75, 0.95)


def test_what_does_not_fit_names_the_largest_and_what_to_change(flat):
    parts = {'params': 20 * GIB, 'optimizer': 30 * GIB, 'batch': 10, 'gradients': 15 * GIB, 'rest': 40 * GIB}
    planned = Planned(flat, parts, [], [Buffer(3 * GIB, 'bf16[36,8,4096,4096]')])
    text = describe(planned, H100)
    assert '105.00 GiB' in text
    assert '3.00 GiB   bf16[36,8,4096,4096]' in text
    name, size = largest(flat)[0]
    assert name.startswith('params/layers/')
    assert name.endswith('/kernel')
    assert size == 8 * 16 * 24 * 4 // 4  # eight layers, 16 x 24, float32, over fsdp=4
    assert name in text
    advice = text.split('what to change')[1].splitlines()
    assert advice[1].strip().startswith('rest: batch.microbatches larger')
    assert advice[2].strip().startswith("optimizer: optimizer.moments='int8'")
    fine = describe(planned._replace(parts=parts | {'rest': 1}), H100)
    assert 'what to change' not in fine


@pytest.mark.parametrize(
    ('architecture', 'mesh', 'tensor', 'size'),
    [
        # Eight layers of four experts, 40 x 16; divided over both axes.
        (MIXTURE, {'expert': 4, 'fsdp': 2}, '/mlp/experts/', 8 * 4 * 40 * 16 * 4 // 8),
        # Four taps for each of 64 channels, whole on every device.
        (HYBRID, {'fsdp': 8}, '/mamba/conv_x/', 64 * 4 * 4),
    ],
)
def test_largest_tensors_of_experts_and_of_mamba_layers_are_named(architecture, mesh, tensor, size):
    job = job_of(mesh, architecture=architecture)
    planned = Planned(job, {'params': 80 * GIB, 'gradients': 0, 'rest': 0}, [], [])
    text = describe(planned, H100)
    assert 'DOES NOT FIT' in text
    listed = text.split('largest tensors of the state:')[1]
    names = [line.split()[-1] for line in listed.splitlines()[1:6]]
    assert any(tensor in name for name in names), names
    assert max(rest for name, rest in largest(job, 1000) if tensor in name) == size


def test_bounds_of_a_mixture_are_those_of_its_active_parameters():
    """Bytes that are sent are counted from the collectives: of an all-to-all among 4, three quarters leave."""
    job = job_of({'expert': 4, 'fsdp': 2}, architecture=MIXTURE, dtype='bfloat16')
    exchange = Collective('all-to-all', 'bf16', ((4, 96, 16),), 4 * 96 * 16 * 2, (0, 1, 2, 3), 48)
    planned = Planned(job, {'params': 3 * GIB, 'optimizer': GIB, 'gradients': 2 * GIB, 'rest': 7 * GIB}, [exchange], [])
    bounds = bounds_of(planned, H100)
    layer = 16 * 4 * 16 + 4 * 16 + 2 * 3 * 40 * 16  # attention, router, two experts of a token
    per_token = 6 * (8 * layer + 64 * 16) + 3 * 8 * 4 * 16 * 4  # and scores of eight tokens
    assert bounds.flops == pytest.approx(per_token * 8 * 8 / 8)
    assert bounds.products == pytest.approx(bounds.flops / 989.4e12)
    assert bounds.touched == 2 * 6 * GIB
    assert bounds.sent == pytest.approx(48 * 4 * 96 * 16 * 2 * 3 / 4)
    assert bounds.roofline == bounds.memory == pytest.approx(12 * GIB / 3.352e12)
    assert 'further rounds of exchange are not counted' in describe(planned, H100)


def test_rounds_that_an_even_router_does_not_need_are_left_out():
    line = '  %{} = bf16[4]{{0}} all-to-all(%x), replica_groups={{{{0,1}}}}, metadata={{op_name="jit(step)/{}"}}'
    lines = ['ENTRY %main () -> bf16[4] {', line.format('a', 'mlp/all_to_all'), '}']
    late = [line.format('b', 'late_round/cond/all_to_all'), line.format('c', 'transpose(jvp(late_round))/all_to_all')]
    assert without_late_rounds('\n'.join([*lines[:2], *late, lines[2]])) == '\n'.join(lines)
    assert without_late_rounds('\n'.join([line.format('d', 'latest_rounds/x')])) == line.format('d', 'latest_rounds/x')


REPORT = """Memory Space: default (color=0)
Total bytes: 71506302631 (66.59GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    3.38GiB(  5%);    3.38GiB;            0;                7; f32[151936,512], f32[8,2], 5\u00d7bf16[36,1,4096,12288]
    4.22GiB( 79%);  864.00MiB;  54431580160;                1; bf16[512,36,12288], f32[512,36,12288]
        24B(100%);        24B;            0;                1; s32[6]
"""


def test_report_of_the_compiler_is_read():
    found = read_buffers(REPORT)
    assert [buffer.shape for buffer in found] == ['bf16[36,1,4096,12288]', 'f32[512,36,12288]', 's32[6]']
    assert found[0].bytes == int(3.38 * GIB)
    assert [buffer.bytes for buffer in found[1:]] == [864 * 2**20, 24]
    assert read_buffers('something else') == []
