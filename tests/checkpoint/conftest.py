"""Directories of tiny models and tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_tensors import Tensors, save_safetensors


@pytest.fixture
def write_hf_dir(tmp_path: Path) -> Callable[..., Path]:
    """A function (config, tensors, name='hf') -> directory, with a tokenizer's and a generation config beside it."""

    def write(config: dict[str, Any], tensors: Tensors, name: str = 'hf') -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / 'config.json').write_text(json.dumps(config))
        (directory / 'generation_config.json').write_text('{"eos_token_id": 2}')
        save_safetensors(directory / 'model.safetensors', tensors)
        return directory

    return write


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A directory with a word-level tokenizer of nine entries."""
    from tokenizers import Tokenizer, models

    directory = tmp_path / 'tokenizer'
    directory.mkdir()
    vocab = {word: number for number, word in enumerate(['<unk>', '<s>', '</s>', 'a', 'b', 'c', 'd', 'e', 'f'])}
    Tokenizer(models.WordLevel(vocab, unk_token='<unk>')).save(str(directory / 'tokenizer.json'))
    (directory / 'tokenizer_config.json').write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return directory
