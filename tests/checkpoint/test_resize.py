"""More and fewer rows of the vocabulary."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_tensors import LLAMA, llama_tensors

from jpt.checkpoint.hf_import import HuggingFaceSource, load_hf
from jpt.checkpoint.resize import ResizedSource, resize_vocabulary
from jpt.models.names import leaves

Write = Callable[..., Path]


@pytest.mark.parametrize('tied', [False, True])
def test_new_rows_are_the_mean_of_the_old(write_hf_dir: Write, tied: bool) -> None:
    tensors = llama_tensors(tied=tied)
    cfg, params = load_hf(write_hf_dir(LLAMA | {'tie_word_embeddings': tied}, tensors))
    bigger, resized = resize_vocabulary(cfg, params, 14)
    assert bigger.vocab_size == 14
    tables = {'model.embed_tokens.weight': resized['embed']['embedding']}
    tables |= {} if tied else {'lm_head.weight': resized['lm_head']['kernel']}
    for name, table in tables.items():
        np.testing.assert_array_equal(table[:11], tensors[name])
        mean = tensors[name].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(np.asarray(table[11:]), np.stack([mean] * 3), rtol=1e-6)
    assert resized['layers'][0][0]['mlp']['up']['kernel'].shape == (3, 12, 8)


def test_rows_beyond_the_tokenizer_do_not_count(write_hf_dir: Write) -> None:
    tensors = llama_tensors()
    tensors['lm_head.weight'][9:] = 1e6  # padding that no id uses
    cfg, params = load_hf(write_hf_dir(LLAMA, tensors))
    _, resized = resize_vocabulary(cfg, params, 12, used=9)
    mean = tensors['lm_head.weight'][:9].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(np.asarray(resized['lm_head']['kernel'][11]), mean, rtol=1e-6)
    smaller, cut = resize_vocabulary(cfg, params, 9, used=9)
    assert smaller.vocab_size == 9
    np.testing.assert_array_equal(cut['lm_head']['kernel'], tensors['lm_head.weight'][:9])


@pytest.mark.parametrize(
    ('size', 'used', 'message'),
    [
        (10, None, 'vocab_size=10 is too small: any of the 11 rows may be in use'),
        (8, 9, 'vocab_size=8 is too small: the tokenizer has 9 ids'),
        (12, 13, 'vocab_size=12 is too small: the tokenizer has 13 ids'),
        (0, 0, 'vocab_size=0: expected at least 1'),
    ],
)
def test_ids_in_use_are_not_cut(write_hf_dir: Write, size: int, used: int | None, message: str) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    with pytest.raises(ValueError, match=message):
        resize_vocabulary(cfg, params, size, used=used)


def test_a_cut_on_request(write_hf_dir: Write) -> None:
    tensors = llama_tensors()
    cfg, params = load_hf(write_hf_dir(LLAMA, tensors))
    _, cut = resize_vocabulary(cfg, params, 4, used=9, allow_cut=True)
    np.testing.assert_array_equal(cut['embed']['embedding'], tensors['model.embed_tokens.weight'][:4])


def test_parts_across_the_seam(write_hf_dir: Write) -> None:
    tensors = llama_tensors(ml_dtypes.bfloat16)
    source = ResizedSource(HuggingFaceSource(write_hf_dir(LLAMA, tensors)), 15)
    table = leaves(source.cfg)[0]
    whole = source.read(table, (slice(0, 15), slice(0, 8)))
    assert whole.dtype == ml_dtypes.bfloat16
    for rows in (slice(0, 4), slice(9, 13), slice(12, 15), slice(11, 12)):
        np.testing.assert_array_equal(source.read(table, (rows, slice(2, 5))), whole[rows, 2:5])
