"""Megatron's .bin/.idx: against byte strings put together by hand from the format's description."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jpt.data.indexed import IndexedDataset, IndexedWriter, prefix_of, token_dtype

# Three sequences, 2 + 0 + 3 tokens; the first document holds two of them, the second one.
IDX = (
    b'MMIDIDX\x00\x00'
    + b'\x01\x00\x00\x00\x00\x00\x00\x00'  # version
    + b'\x08'  # uint16
    + b'\x03\x00\x00\x00\x00\x00\x00\x00'  # sequences
    + b'\x03\x00\x00\x00\x00\x00\x00\x00'  # document bounds
    + b'\x02\x00\x00\x00' + b'\x00\x00\x00\x00' + b'\x03\x00\x00\x00'  # lengths
    + struct.pack('<qqq', 0, 4, 4)  # pointers, in bytes
    + struct.pack('<qqq', 0, 2, 3)  # bounds
)  # fmt: skip
BIN = b'\x01\x00\x02\x00' + b'\x03\x00\xff\xfe\x05\x00'


def write(folder, idx=IDX, tokens=BIN):
    (folder / 'x.idx').write_bytes(idx)
    (folder / 'x.bin').write_bytes(tokens)
    return folder / 'x'


def test_reading_bytes_by_hand(tmp_path):
    data = IndexedDataset(write(tmp_path))
    assert len(data) == 2
    assert data[0].tolist() == [1, 2]
    assert data[1].tolist() == [3, 0xFEFF, 5]
    assert data.document_lengths().tolist() == [2, 3]
    assert data.dtype == np.uint16
    with pytest.raises(IndexError, match='document 2 of'):
        data[2]


def test_writing_bytes_by_hand(tmp_path):
    with IndexedWriter(tmp_path / 'x', vocab_size=65499) as writer:
        writer.add_document([[1, 2], []])
        writer.add(np.array([3, 0xFEFF, 5]))
    assert (tmp_path / 'x.idx').read_bytes() == IDX
    assert (tmp_path / 'x.bin').read_bytes() == BIN
    assert len(IDX) == 34 + 3 * 4 + 3 * 8 + 3 * 8


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    assert [token_dtype(n) for n in (257, 65499, 65500, 151936)] == [np.uint16, np.uint16, np.int32, np.int32]
    with IndexedWriter(tmp_path / 'new' / 'x', vocab_size=151936) as writer:
        writer.add([151935])
    assert (tmp_path / 'new' / 'x.bin').read_bytes() == b'\x7f\x51\x02\x00'
    assert (tmp_path / 'new' / 'x.idx').read_bytes()[17] == 4
    assert IndexedDataset(tmp_path / 'new' / 'x')[0].tolist() == [151935]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=6))
def test_what_is_written_is_read(tmp_path, documents):
    with IndexedWriter(tmp_path / 'x', vocab_size=300) as writer:
        for document in documents:
            writer.add(document)
    data = IndexedDataset(tmp_path / 'x')
    assert [data[i].tolist() for i in range(len(data))] == documents


def test_sequences_that_lie_in_another_order(tmp_path):
    swapped = IDX[: 34 + 12] + struct.pack('<qqq', 6, 0, 0) + IDX[34 + 36 :]
    data = IndexedDataset(write(tmp_path, swapped))
    assert data[0].tolist() == [0xFEFF, 5]
    assert data[1].tolist() == [1, 2, 3]


def test_other_integer_types_are_read(tmp_path):
    wide = IDX[:17] + b'\x05' + IDX[18:46] + struct.pack('<qqq', 0, 16, 16) + IDX[70:]
    data = IndexedDataset(write(tmp_path, wide, np.array([7, 8, 9, 10, 11], '<i8').tobytes()))
    assert data[1].tolist() == [9, 10, 11]


@pytest.mark.parametrize(
    ('idx', 'tokens', 'message'),
    [
        (b'PK\x03\x04' + IDX[4:], BIN, r"x\.idx: bad header: b'PK"),
        (b'', BIN, r'x\.idx: bad header'),
        (IDX[:9] + b'\x02' + IDX[10:], BIN, r'x\.idx: bad version 2: expected 1'),
        (IDX[:20], BIN, r'x\.idx is truncated: 20 bytes, its header alone has 34'),
        (IDX[:-1], BIN, r'x\.idx is truncated: 93 bytes, its header promises 94'),
        (IDX, BIN[:-2], r'x\.bin is truncated: 8 bytes, but .*x\.idx points up to 10'),
        (IDX, b'', r'x\.bin is truncated: 0 bytes'),
        (IDX[:17] + b'\x07' + IDX[18:], BIN, r'dtype code 7: expected 1 \(u8\)'),
        (IDX[:17] + b'\x63' + IDX[18:], BIN, 'dtype code 99'),
        (IDX + b'\x00\x01\x00', BIN, 'multimodal modes, which are not read'),
        (IDX + b'\x00', BIN, '1 bytes follow the index: unknown data'),
        (IDX[:34] + b'\xff\xff\xff\xff' + IDX[38:], BIN, 'a length or pointer is negative'),
        (IDX[:46] + b'\x01' + IDX[47:], BIN, 'not a multiple of 2'),
        (IDX[:-8] + struct.pack('<q', 2), BIN, 'must rise from 0 to the number of sequences, 3'),
    ],
    ids=range(14),
)
def test_damaged_files_are_named(tmp_path, idx, tokens, message):
    with pytest.raises(ValueError, match=message):
        IndexedDataset(write(tmp_path, idx, tokens))


def test_half_a_pair_is_named(tmp_path):
    (tmp_path / 'x.idx').write_bytes(IDX)
    with pytest.raises(FileNotFoundError, match=r'x\.bin: an indexed dataset is a pair'):
        IndexedDataset(tmp_path / 'x.idx')


def test_a_broken_run_leaves_no_index(tmp_path):
    write(tmp_path)
    writer = IndexedWriter(tmp_path / 'x', vocab_size=300)

    def run():
        with writer:
            writer.add([1])
            writer.add([2, 300])

    with pytest.raises(ValueError, match=r'x\.bin: document 1: id 300, but vocab_size=300'):
        run()
    assert not (tmp_path / 'x.idx').exists()
    with pytest.raises(ValueError, match='inside its `with` block'):
        IndexedWriter(tmp_path / 'y', 300).add([1])


def test_an_empty_dataset_and_names(tmp_path):
    with IndexedWriter(tmp_path / 'x.bin', vocab_size=300):
        pass
    assert len(IndexedDataset(tmp_path / 'x')) == 0
    assert prefix_of('a/b.c.idx') == prefix_of('a/b.c.bin') == prefix_of('a/b.c')
