"""Windows drawn from texts: each once, of different texts where there are enough, the same for the same seed."""

import numpy as np
import pytest

from jpt.data.records import Chat
from jpt.data.sources import MemorySource
from jpt.evaluation.samples import sampled_rows

TEXTS = [chr(97 + n) * size for n, size in enumerate((1, 5, 9, 30, 2, 8))]


def ids(text: str) -> list[int]:
    """Each character with its place, so that every token of all texts is another."""
    return [100 * (ord(letter) - 97) + place for place, letter in enumerate(text)]


def drawn(count: int, seed: int = 0, texts: list[str] = TEXTS):
    return sampled_rows(MemorySource(texts), ids, count, 4, seed)


def test_few_windows_are_of_different_texts():
    rows = drawn(4)
    numbers = [number for number, _, _ in rows]
    assert len(set(numbers)) == 4
    assert 0 not in numbers  # one token: nothing to predict
    for number, piece, skipped in rows:
        assert skipped == 0
        assert piece.tolist() == list(range(piece[0], piece[0] + len(piece)))
        assert piece[0] // 100 == number


def test_many_windows_are_all_there_is():
    """Every token but the first of a text is predicted once."""
    rows = drawn(100)
    targets = sorted(token for _, piece, _ in rows for token in piece[1:].tolist())
    assert targets == [100 * n + place for n, text in enumerate(TEXTS) for place in range(1, len(text))]
    assert len(drawn(10)) == 10


def test_the_seed_draws():
    same, other = [[piece.tolist() for _, piece, _ in drawn(4, seed)] for seed in (0, 1)]
    assert same == [piece.tolist() for _, piece, _ in drawn(4, 0)]
    assert same != other


def test_token_ids_are_taken_as_they_are():
    source = MemorySource([np.arange(3, 7)])
    assert sampled_rows(source, ids, 1, 8, 0)[0][1].tolist() == [3, 4, 5, 6]


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match='no text has two tokens'):
        drawn(3, texts=['a', 'b'])
    chat = Chat([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])
    with pytest.raises(ValueError, match=r'memory\[0\]: expected a text, not a conversation'):
        sampled_rows(MemorySource([chat]), ids, 1, 4, 0)
