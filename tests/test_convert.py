"""The conversion command as a user types it, and its errors."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jpt.convert import convert, peak_memory

GOLDEN = Path(__file__).parent / 'golden' / 'models'


def run(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', 'jpt.convert', *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in directory.glob('*.safetensors'):
        found |= load_file(file)
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert set(left) == set(right)
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_there_and_back_on_the_command_line(tmp_path: Path) -> None:
    source = GOLDEN / 'llama_tied'
    there = run(f'--input={source}', f'--output={tmp_path / "jpt"}', '--to=jpt')
    assert there.returncode == 0, there.stderr
    assert '100.0 %' in there.stdout
    count = sum(array.size for array in tensors_of(source).values())
    assert f'llama, {count:,} parameters' in there.stdout
    assert 'peak memory' in there.stdout
    back = run(f'--input={tmp_path / "jpt"}', f'--output={tmp_path / "hf"}', '--to=hf', '--max_shard_size=20kB')
    assert back.returncode == 0, back.stderr
    assert_same_bits(source, tmp_path / 'hf')
    assert (tmp_path / 'hf' / 'model.safetensors.index.json').is_file()
    assert (tmp_path / 'hf' / 'generation_config.json').is_file()


def test_errors_are_plain(tmp_path: Path) -> None:
    done = run('--input=nowhere', '--to=jpt', f'--output={tmp_path / "out"}')
    assert (done.returncode, done.stderr.strip()) == (1, 'error: nowhere: no such directory')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['gpt2', 'gemma3_irregular', 'qwen3_mixed'])
def test_there_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    seen: list[tuple[str, int, int]] = []
    there = convert(GOLDEN / name, tmp_path / 'jpt', 'jpt', report=lambda *args: seen.append(args))
    assert seen[-1][1] == seen[-1][2] == there.bytes
    again = convert(tmp_path / 'jpt', tmp_path / 'jpt2', 'jpt')
    back = convert(tmp_path / 'jpt2', tmp_path / 'hf', 'hf')
    assert_same_bits(GOLDEN / name, tmp_path / 'hf')
    assert there[:5] == again[:5] == back[:5]
    assert back.files == 1


def test_a_cast_is_what_numpy_casts(tmp_path: Path) -> None:
    result = convert(GOLDEN / 'qwen3', tmp_path / 'out', 'hf', dtype='bfloat16')
    assert result.dtypes == 'bfloat16'
    expected = tensors_of(GOLDEN / 'qwen3')
    for name, array in tensors_of(tmp_path / 'out').items():
        assert array.tobytes() == expected[name].astype(ml_dtypes.bfloat16).tobytes(), name


def test_added_tokens_get_rows(tmp_path: Path) -> None:
    before = tensors_of(GOLDEN / 'qwen3')['model.embed_tokens.weight']
    result = convert(GOLDEN / 'qwen3', tmp_path / 'out', 'hf', resize_vocab=len(before) + 3)
    after = tensors_of(tmp_path / 'out')['model.embed_tokens.weight']
    assert result.vocabulary == len(after) == len(before) + 3
    np.testing.assert_array_equal(after[:-3], before)
    np.testing.assert_allclose(after[-1], before.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['vocab_size'] == len(after)


def test_rows_that_the_tokenizer_uses_stay(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / 'models' / 'stories260K'  # 512 rows and 512 ids
    with pytest.raises(ValueError, match='vocab_size=500 is too small: the tokenizer has 512 ids'):
        convert(source, tmp_path / 'out', 'jpt', resize_vocab=500)
    assert convert(source, tmp_path / 'out', 'jpt', resize_vocab=500, allow_cut=True).vocabulary == 500


def test_a_bad_request_leaves_no_output(tmp_path: Path) -> None:
    tensors = tensors_of(GOLDEN / 'llama')
    del tensors['model.norm.weight']
    broken = tmp_path / 'broken'
    broken.mkdir()
    (broken / 'config.json').write_bytes((GOLDEN / 'llama' / 'config.json').read_bytes())
    save_file(tensors, broken / 'model.safetensors')
    with pytest.raises(ValueError, match=r'model\.norm\.weight: missing'):
        convert(broken, tmp_path / 'out', 'jpt')
    with pytest.raises(ValueError, match="size 'big': expected"):
        convert(GOLDEN / 'llama', tmp_path / 'out', 'hf', max_shard_size='big')
    with pytest.raises(ValueError, match="--to='onnx': expected hf or jpt"):
        convert(GOLDEN / 'llama', tmp_path / 'out', 'onnx')
    with pytest.raises(FileExistsError, match='exists already'):
        convert(GOLDEN / 'llama', broken, 'hf')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['broken']


def test_peak_memory_lies_between_what_is_held_and_what_the_kernel_counts() -> None:
    held = int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    peak = peak_memory()
    # The kernel counts in batches per thread, so its three figures differ by some pages.
    assert 0.95 * held < peak < 1.05 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
