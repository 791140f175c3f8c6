"""Weights over several files: the plan, the index, and directories that do not agree with themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.safetensors_writer import save_file
from jpt.checkpoint.shards import INDEX_FILE, ShardedReader, ShardedWriter, parse_size, plan_shards

FLOAT = np.dtype(np.float32)


def specs_of(sizes: dict[str, int]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(FLOAT, (size,)) for name, size in sizes.items()}


def write_four(directory: Path, max_shard_size: str | int) -> dict[str, np.ndarray]:
    arrays = {name: np.full(10, float(number), FLOAT) for number, name in enumerate('abcd')}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    with ShardedWriter(directory, specs, max_shard_size) as writer:
        for name in 'dbca':
            writer.write(name, arrays[name])
    return arrays


@pytest.mark.parametrize(
    ('text', 'size'),
    [
        ('5GB', 5 * 10**9),
        ('1.5 kb', 1500),
        ('2MiB', 2 * 2**20),
        ('1000', 1000),
        (17, 17),
        ('1GiB', 2**30),
        ('2TB', 2 * 10**12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', 'GB', '5 parsec', '-1MB', '0', '0GB', '1e3'])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match='expected a positive number with a unit of KB, MB'):
        parse_size(text)


def test_shards_are_filled_in_order_and_never_beyond_the_limit() -> None:
    plan = plan_shards(specs_of({'a': 10, 'b': 10, 'huge': 100, 'c': 5, 'd': 15, 'e': 1}), 80)
    assert {file: list(shard) for file, shard in plan.items()} == {
        'model-00001-of-00004.safetensors': ['a', 'b'],
        'model-00002-of-00004.safetensors': ['huge'],
        'model-00003-of-00004.safetensors': ['c', 'd'],
        'model-00004-of-00004.safetensors': ['e'],
    }
    assert list(plan_shards(specs_of({'a': 10, 'b': 10}), 80)) == ['model.safetensors']


def test_round_trip_in_shards_with_the_index_that_transformers_reads(tmp_path: Path) -> None:
    arrays = write_four(tmp_path, 80)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    first, second = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
    assert index == {'metadata': {'total_size': 160}, 'weight_map': {'a': first, 'b': first, 'c': second, 'd': second}}
    reader = ShardedReader(tmp_path)
    assert reader.largest_file() == max(path.stat().st_size for path in tmp_path.glob('*.safetensors'))
    for name, array in arrays.items():
        np.testing.assert_array_equal(reader.view(name), array)


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    write_four(tmp_path, '5GB')
    assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
    assert list(ShardedReader(tmp_path).tensors) == ['a', 'b', 'c', 'd']


def test_nothing_appears_when_a_tensor_is_missing(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, specs_of({'a': 1, 'b': 1}), 4)
    with pytest.raises(ValueError, match='not written exactly once: b'), writer:
        writer.write('a', np.zeros(1, FLOAT))
    assert not (tmp_path / INDEX_FILE).exists()


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_four(tmp_path, 80)
    (tmp_path / 'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match=r'not there: model-00002-of-00002\.safetensors'):
        ShardedReader(tmp_path)


def test_an_index_that_disagrees_with_a_shard_is_refused(tmp_path: Path) -> None:
    write_four(tmp_path, 80)
    save_file(tmp_path / 'model-00002-of-00002.safetensors', {'c': np.zeros(1), 'x': np.zeros(1)})
    with pytest.raises(ValueError, match=r"only in the index \['d'\], only in the shard \['x'\]"):
        ShardedReader(tmp_path)


@pytest.mark.parametrize('text', ['', '[]', '{"weight_map": 3}', '{}', '{"weight_map": {"a": ["b"]}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match='expected a JSON object with a weight_map'):
        ShardedReader(tmp_path)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'pytorch_model\.bin: pickled weights can run code'):
        ShardedReader(tmp_path)


def test_an_absent_or_empty_directory_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no weights; expected model\.safetensors'):
        ShardedReader(tmp_path)
    with pytest.raises(FileNotFoundError, match='no such directory'):
        ShardedReader(tmp_path / 'nothing')
