"""The safetensors format against the safetensors package, and against files that are wrong in one place each."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpt.checkpoint.dtypes import SAFETENSORS_CODES
from jpt.checkpoint.safetensors import SafetensorsFile, TensorSpec, load_file
from jpt.checkpoint.safetensors_writer import SafetensorsWriter, save_file

package = pytest.importorskip('safetensors')

WIDE = [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def all_bits(dtype: type) -> np.ndarray:
    """An odd number of elements with every bit pattern of the low 16 bits, NaNs and infinities included."""
    if dtype is np.bool_:
        return np.array([True, False, True])
    size = np.dtype(dtype).itemsize
    count = min(2 ** (8 * size), 2**16) - 1
    return np.arange(count, dtype=f'u{size}').view(dtype)


def tensors_of_every_dtype() -> dict[str, np.ndarray]:
    tensors = {np.dtype(dtype).name: all_bits(dtype) for dtype in WIDE + FLOATS}
    return tensors | {'matrix': np.arange(6, dtype=np.float32).reshape(2, 3), 'scalar': np.array(2.5, np.float32)}


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file as package_save

    tensors = tensors_of_every_dtype() | {'empty': np.zeros((0, 3), np.float32)}
    package_save(tensors, str(tmp_path / 'a.safetensors'), {'format': 'pt'})
    file = SafetensorsFile(tmp_path / 'a.safetensors')
    assert file.metadata == {'format': 'pt'}
    assert set(file.tensors) == set(tensors)
    for name, array in tensors.items():
        read = file.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    save_file(tmp_path / 'a.safetensors', tensors, {'format': 'pt'})
    raw = (tmp_path / 'a.safetensors').read_bytes()
    assert int.from_bytes(raw[:8], 'little') % 8 == 0
    found = dict(package.deserialize(raw))
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert found[name]['dtype'] == SAFETENSORS_CODES[array.dtype], name
        assert tuple(found[name]['shape']) == array.shape
        assert bytes(found[name]['data']) == array.tobytes(), name
    with package.safe_open(str(tmp_path / 'a.safetensors'), 'np') as opened:
        assert opened.metadata() == {'format': 'pt'}
        np.testing.assert_array_equal(opened.get_tensor('matrix'), tensors['matrix'])


def test_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    save_file(tmp_path / 'a.safetensors', tensors)
    raw = (tmp_path / 'a.safetensors').read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], 'little')])
    for name, array in tensors.items():
        assert (8 + int.from_bytes(raw[:8], 'little') + header[name]['data_offsets'][0]) % array.dtype.itemsize == 0


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), data=st.data())
def test_parts_equal_slices_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject
):
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    path = tmp_path_factory.mktemp('parts') / 'a.safetensors'
    save_file(path, {'before': np.zeros(3, np.uint8), 'x': array, 'after': np.zeros(5, np.float64)})
    bounds = [sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2))) for size in shape]
    index = tuple(slice(*bound) for bound in bounds)
    np.testing.assert_array_equal(SafetensorsFile(path).read('x', index), array[index])


def test_rows_may_be_written_in_any_order(tmp_path: Path) -> None:
    whole = np.arange(20, dtype=np.float32).reshape(5, 4)
    specs = {'x': TensorSpec(whole.dtype, whole.shape), 'y': TensorSpec(np.dtype(np.int8), ())}
    with SafetensorsWriter(tmp_path / 'a.safetensors', specs) as writer:
        writer.write('x', whole[3:], first_row=3)
        writer.write('y', np.array(7, np.int8))
        writer.write('x', whole[:3])
        assert not (tmp_path / 'a.safetensors').exists()
    np.testing.assert_array_equal(load_file(tmp_path / 'a.safetensors')['x'], whole)
    assert load_file(tmp_path / 'a.safetensors')['y'] == 7
    assert [path.name for path in tmp_path.iterdir()] == ['a.safetensors']


def test_an_incomplete_file_never_appears(tmp_path: Path) -> None:
    specs = {'x': TensorSpec(np.dtype(np.float32), (5, 4))}
    writer = SafetensorsWriter(tmp_path / 'a.safetensors', specs)
    writer.write('x', np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match='not written exactly once: x'):
        writer.close()
    with pytest.raises(KeyError, match='stop'), SafetensorsWriter(tmp_path / 'a.safetensors', specs):
        raise KeyError('stop')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('name', 'array', 'row', 'message'),
    [
        ('z', np.zeros(2, np.float32), 0, "'z' was not announced"),
        ('x', np.zeros((2, 3), np.float16), 0, 'announced as float32'),
        ('x', np.zeros((2, 4), np.float32), 0, r'got float32 \[2, 4\]'),
        ('x', np.zeros((2, 3), np.float32), 1, 'at row 1'),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, array: np.ndarray, row: int, message: str) -> None:
    specs = {'x': TensorSpec(np.dtype(np.float32), (2, 3))}
    with pytest.raises(ValueError, match=message), SafetensorsWriter(tmp_path / 'a.safetensors', specs) as writer:
        writer.write(name, array, row)


def test_a_dtype_without_a_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor 'x': dtype int4 has no safetensors code; expected one of bool, uint8"):
        save_file(tmp_path / 'a.safetensors', {'x': np.zeros(2, ml_dtypes.int4)})


def raw_file(header: object, data: bytes = b'', length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = 'U8') -> dict[str, object]:
    return {'dtype': dtype, 'shape': [end - start] if shape is None else shape, 'data_offsets': [start, end]}


@pytest.mark.parametrize(
    ('raw', 'message'),
    [
        (b'', '0 bytes are too few'),
        (b'\x01\x02', '2 bytes are too few'),
        (raw_file({}, length=10**9), 'header length 1000000000 exceeds'),
        (raw_file({}, length=3), 'header length 3 exceeds'),
        (raw_file(b'{"a": '), 'the header is not JSON'),
        (raw_file(b'\xff\xfe'), 'the header is not JSON'),
        (raw_file([1]), 'a JSON list, expected an object'),
        (raw_file({'__metadata__': {'a': 1}}), '__metadata__ must map strings to strings'),
        (raw_file(b'{"x": {}, "x": {}}'), "names 'x' more than once"),
        (raw_file({'x': {'dtype': 'U8'}}), "tensor 'x': expected exactly the fields"),
        (raw_file({'x': entry(0, 2, dtype='F4')}, b'12'), "tensor 'x': dtype 'F4': expected one of BOOL, U8"),
        (raw_file({'x': entry(0, 2, [-2])}, b'12'), "tensor 'x': shape .-2. and data_offsets"),
        (raw_file({'x': entry(0, 2, [True])}, b'12'), "tensor 'x': shape .True. and"),
        (raw_file({'x': entry(0, 2, [3])}, b'12'), r"tensor 'x': .* span 2 bytes, but U8 \[3\] takes 3"),
        (raw_file({'x': entry(0, 4)}, b'12'), "tensor 'x' ends at byte .*; the file is truncated"),
        (raw_file({'x': entry(1, 2)}, b'12'), "tensor 'x' starts at byte .*, expected"),
        (raw_file({'x': entry(0, 2), 'y': entry(1, 3)}, b'123'), "tensor 'y' starts at byte"),
        (raw_file({'x': entry(0, 1), 'y': entry(2, 3)}, b'123'), "tensor 'y' starts at byte"),
        (raw_file({'x': entry(0, 2)}, b'123'), '1 bytes follow the last tensor'),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / 'bad.safetensors'
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_found_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / 'a.safetensors'
    save_file(path, {'x': np.arange(6, dtype=np.int16), 'y': np.ones((2, 2), np.float32)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'a\.safetensors'):
            SafetensorsFile(path)


def test_an_unknown_tensor_is_a_key_error(tmp_path: Path) -> None:
    save_file(tmp_path / 'a.safetensors', {'x': np.zeros(1)})
    with pytest.raises(KeyError, match='no tensor'):
        SafetensorsFile(tmp_path / 'a.safetensors').view('y')
