"""Directories that appear whole or not at all; the files that travel; names of dtypes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jpt.checkpoint.assets import copy_assets, has_tokenizer, open_tokenizer, tokenizer_fingerprint
from jpt.checkpoint.directories import new_directory
from jpt.checkpoint.dtypes import cast, cast_target, is_floating


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    with new_directory(tmp_path / 'deep' / 'out') as directory:
        (directory / 'a').write_text('x')
        assert not (tmp_path / 'deep' / 'out').exists()
    assert (tmp_path / 'deep' / 'out' / 'a').read_text() == 'x'
    assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['out']


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / 'out') as directory:
            (directory / 'a').write_text('x')
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / 'out.incomplete').mkdir()
    (tmp_path / 'out.incomplete' / 'old').write_text('x')
    (tmp_path / 'out').mkdir()
    with new_directory(tmp_path / 'out') as directory:
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize('content', ['directory', 'file'])
def test_nothing_is_overwritten(tmp_path: Path, content: str) -> None:
    target = tmp_path / 'out'
    if content == 'file':
        target.write_text('mine')
    else:
        target.mkdir()
        (target / 'mine').write_text('mine')
    with pytest.raises(FileExistsError, match='exists already and is not empty'), new_directory(target):
        raise AssertionError('the block must not run')


def test_assets_are_copied_byte_for_byte(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tokenizer_dir / 'generation_config.json').write_bytes(b'{"top_k":\t3}\r\n')
    (tokenizer_dir / 'model.safetensors').write_bytes(b'not an asset')
    names = copy_assets(tokenizer_dir, tmp_path / 'out')
    assert sorted(names) == ['generation_config.json', 'tokenizer.json', 'tokenizer_config.json']
    for name in names:
        assert (tmp_path / 'out' / name).read_bytes() == (tokenizer_dir / name).read_bytes()


def test_the_fingerprint_follows_the_vocabulary(tmp_path: Path, tokenizer_dir: Path) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer_dir)
    copy_assets(tokenizer_dir, tmp_path / 'same')
    assert fingerprint == tokenizer_fingerprint(tmp_path / 'same')
    text = (tokenizer_dir / 'tokenizer.json').read_text()
    copy_assets(tokenizer_dir, tmp_path / 'other')
    (tmp_path / 'other' / 'tokenizer.json').write_text(text.replace('"f"', '"g"'))
    assert tokenizer_fingerprint(tmp_path / 'other') != fingerprint
    tokenizer = open_tokenizer(tokenizer_dir)
    assert tokenizer is not None
    assert tokenizer.vocab_size == 9


def test_a_lone_sentencepiece_model_travels_without_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / 'tokenizer.model').write_bytes(b'pieces')
    assert has_tokenizer(tmp_path)
    assert open_tokenizer(tmp_path) is None
    assert tokenizer_fingerprint(tmp_path / 'nowhere') is None


def test_cast_targets() -> None:
    assert cast_target(None) is None
    assert cast_target('bfloat16') == cast_target(ml_dtypes.bfloat16) == np.dtype(ml_dtypes.bfloat16)
    for wrong in ('float8_e4m3fn', 'int8', np.int32, 'bf16'):
        with pytest.raises(ValueError, match='expected one of float32, float16, bfloat16, float64'):
            cast_target(wrong)


def test_a_cast_rounds_to_nearest_even_and_leaves_integers() -> None:
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)  # bfloat16 has steps of 2**-7 there
    expected = np.array([1.0, 1 + 2**-6, 1 + 2**-7], np.float32)
    np.testing.assert_array_equal(cast(halves, cast_target('bfloat16')).astype(np.float32), expected)
    assert cast(np.arange(3), cast_target('float16')).dtype == np.int64
    assert is_floating(np.dtype(ml_dtypes.float8_e5m2))
    assert not is_floating(np.dtype(np.bool_))
