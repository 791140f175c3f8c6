"""The report of an out-of-memory error: bytes by part, and advice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpt.training.memory import bytes_per_device, explain_out_of_memory, gib, memory_report, wanted_bytes

GIB = 2**30


def _parts():
    mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def shape(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = {'kernel': shape((2**14, 2**13), jnp.float32, 'fsdp', 'tensor'), 'hole': None}
    moments = {'kernel': shape((2**14, 2**13), jnp.bfloat16, 'fsdp'), 'scale': shape((8,), jnp.float32)}
    batch = np.zeros((8, 256), np.int32)
    return {'params': params, 'optimizer': moments, 'batch': batch, 'average': None}


def test_bytes_are_those_of_one_shard():
    parts = _parts()
    assert bytes_per_device(parts['params']) == 2**14 * 2**13 * 4 // 8
    assert bytes_per_device(parts['optimizer']) == 2**14 * 2**13 * 2 // 2 + 32
    assert bytes_per_device(parts['batch']) == 8192
    assert bytes_per_device(None) == 0
    assert bytes_per_device(jax.eval_shape(lambda: jax.random.key(0))) == 8


def test_the_report_lists_parts_and_advises_on_activations_first():
    report = memory_report(_parts(), wanted=3 * GIB, limit=80 * GIB)
    lines = report.splitlines()
    assert lines[1].split() == ['params', '64.00', 'MiB']
    assert lines[2].split() == ['optimizer', '128.00', 'MiB']
    assert lines[3].split() == ['batch', '0.01', 'MiB']
    assert lines[4].startswith('  rest          79.81 GiB  left for gradients, activations')
    assert lines[5].split() == ['device', '80.00', 'GiB']
    assert lines[6].split()[:4] == ['asked', 'for', '3.00', 'GiB']
    assert lines[8].startswith('  rest: batch.microbatches larger')
    assert lines[9].startswith("  optimizer: optimizer.moments='int8'")
    assert len(lines) == 11


def test_a_state_that_fills_the_device_is_named_first():
    report = memory_report(_parts(), limit=GIB // 4)
    assert report.splitlines()[-3].startswith('  optimizer:')


def test_only_out_of_memory_is_explained():
    message = 'RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1536 bytes.'
    with pytest.raises(MemoryError, match=r'params +64\.00 MiB') as caught, explain_out_of_memory(_parts()):
        raise jax.errors.JaxRuntimeError(message)
    assert message in str(caught.value.__cause__)
    assert 'asked for' in str(caught.value)
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), explain_out_of_memory(_parts()):
        raise jax.errors.JaxRuntimeError('INTERNAL: something else')
    with pytest.raises(KeyError), explain_out_of_memory(_parts()):
        raise KeyError('x')


@pytest.mark.parametrize(
    ('message', 'expected'),
    [
        ('Out of memory while trying to allocate 1536 bytes.', 1536),
        ('Out of memory trying to allocate 12.50GiB.', 12.5 * GIB),
        ('Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0', 2 * GIB),
        ('something else', None),
    ],
)
def test_the_failed_allocation_is_read_from_the_message(message, expected):
    assert wanted_bytes(message) == expected


def test_sizes_as_text():
    assert gib(5 * GIB // 2) == '2.50 GiB'
    assert gib(3 * 2**19) == '1.50 MiB'
