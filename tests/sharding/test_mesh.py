import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jpt.sharding.mesh import AXES, MeshConfig, batch_shardings, batch_spec, check_batch, make_mesh, resolve_sizes


def test_minus_one_takes_the_devices_that_are_left():
    sizes = resolve_sizes(MeshConfig(pipe=2, data=-1, tensor=4), 32)
    assert sizes == {'pipe': 2, 'data': 4, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 4}


def test_one_device_is_a_mesh_of_ones():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == ('pipe', 'data', 'fsdp', 'expert', 'context', 'tensor')
    assert set(mesh.shape.values()) == {1}


def test_all_axes_are_automatic_and_neighbours_lie_along_tensor():
    mesh = make_mesh(MeshConfig(pipe=2, data=2, tensor=2))
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(4, 2)[:, 1] - ids.reshape(4, 2)[:, 0], 1)


@pytest.mark.parametrize(
    ('config', 'count', 'words'),
    [
        (MeshConfig(data=3), 8, ['data=3', '3 devices', 'there are 8']),
        (MeshConfig(data=-1, tensor=3), 8, ['tensor=3', 'a multiple of 3', '8']),
        (MeshConfig(data=-1, fsdp=-1), 8, ['data and fsdp', 'at most one']),
        (MeshConfig(pipe=0), 8, ['mesh.pipe=0', 'positive']),
        (MeshConfig(tensor=-2), 8, ['mesh.tensor=-2']),
        (MeshConfig(data=16), 8, ['data=16', '8']),
    ],
)
def test_a_mesh_that_does_not_fit_says_so(config, count, words):
    with pytest.raises(ValueError) as error:
        resolve_sizes(config, count)
    for word in words:
        assert word in str(error.value)


def test_a_batch_lies_over_rows_and_sequence():
    assert batch_spec(2) == PartitionSpec(('data', 'fsdp', 'expert'), 'context')
    assert batch_spec(3) == batch_spec(2)
    assert batch_spec(1) == PartitionSpec(('data', 'fsdp', 'expert'))
    assert batch_spec(0) == PartitionSpec()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    placed = jax.device_put(np.zeros((8, 6)), batch_shardings(mesh, np.zeros((8, 6))))
    assert placed.addressable_shards[0].data.shape == (2, 3)


def test_a_batch_that_does_not_divide_says_which_sizes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    check_batch(mesh, 16, 6, 2)
    with pytest.raises(ValueError, match=r'batch size 12 .*data=2 \* fsdp=2 \* expert=1 \* num_microbatches=2 = 8'):
        check_batch(mesh, 12, 6, 2)
    with pytest.raises(ValueError, match=r'sequence length 5 .*context=2'):
        check_batch(mesh, 16, 5, 2)
    with pytest.raises(ValueError, match='num_microbatches=0'):
        check_batch(mesh, 16, 6, 0)
