"""The words of a vocabulary as the bytes that they stand for, and which of them two vocabularies share."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jpt.data.tokenizer import Tokenizer

# Tokens by role, in the order in which they are paired: of a token with two roles the first one counts.
ROLES = ('eos_token', 'bos_token', 'pad_token')
_BYTE = re.compile(r'<0x([0-9A-Fa-f]{2})>')


def word_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """What every id of a tokenizer adds to a text; None for special tokens and ids that stand for nothing.

    Byte-level vocabularies (GPT-2 and after) and those of SentencePiece ('▁' is a space, '<0xE2>' a byte) are read; a
    space that is only put in front of a text is one here too.

    Raises:
        ValueError: a vocabulary of another kind, such as WordPiece.
    """
    backend = tokenizer.backend
    described = json.loads(backend.to_str())
    kinds = {*_types(described.get('pre_tokenizer')), *_types(described.get('decoder'))}
    model = described['model']['type']
    if 'ByteLevel' not in kinds and model not in ('BPE', 'Unigram'):
        raise ValueError(
            f'the tokenizer of {tokenizer.source} is a {model} model: expected a byte-level vocabulary, or BPE or '
            'Unigram pieces as SentencePiece has them: the bytes of other words are not known'
        )
    marks = [name for name in ('end_of_word_suffix', 'continuing_subword_prefix') if described['model'].get(name)]
    if marks:
        raise ValueError(
            f'the tokenizer of {tokenizer.source} has {marks[0]}={described["model"][marks[0]]!r}: expected words '
            'without a mark of their place: what such a word adds to a text is not known'
        )
    read = _of_byte_level if 'ByteLevel' in kinds else _of_piece
    added = backend.get_added_tokens_decoder()
    found: list[bytes | None] = [None] * tokenizer.vocab_size
    for word, index in backend.get_vocab(with_added_tokens=True).items():
        token = added.get(index)
        if token is None:
            found[index] = read(word)
        elif not token.special:
            found[index] = token.content.encode()
    return found


def shared_words(student: Tokenizer, teacher: Tokenizer) -> np.ndarray:
    """Of every word of the teacher the student's id of the same bytes, -1 where there is none: int32 [V of teacher].

    Special tokens are paired by role (end, beginning, padding), never otherwise. No id is there twice: of several
    words of the same bytes ('A' and '<0x41>') the one that a text is split into counts, on both sides.
    """
    table = np.full(teacher.vocab_size, -1, np.int32)
    ours, theirs = (_index(each) for each in (student, teacher))
    for word, index in theirs.items():
        table[index] = ours.get(word, -1)
    for role in ROLES:
        own, other = (each.role_id(role) for each in (student, teacher))
        if own is not None and other is not None and table[other] < 0 and own not in table:
            table[other] = own
    return table


def _index(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The id of every byte string; a byte of a fallback only where nothing else stands for it."""
    found: dict[bytes, int] = {}
    words = word_bytes(tokenizer)
    fallback = [bool(_BYTE.fullmatch(tokenizer.backend.id_to_token(i) or '')) for i in range(len(words))]
    for index in sorted(range(len(words)), key=lambda i: (fallback[i], i)):
        word = words[index]
        if word:
            found.setdefault(word, index)
    return found


def _types(part: Any) -> Iterator[str]:
    """The types of a pre-tokenizer or decoder and of all parts of it."""
    if isinstance(part, dict):
        yield str(part.get('type', ''))
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, Sequence) and not isinstance(part, str):
        for value in part:
            yield from _types(value)


def _alphabet() -> dict[str, int]:
    """The byte of every letter of a byte-level vocabulary: printable Latin-1 is itself, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _alphabet()


def _of_byte_level(word: str) -> bytes | None:
    return bytes(_LETTERS[letter] for letter in word) if _LETTERS.keys() >= set(word) else None


def _of_piece(word: str) -> bytes:
    byte = _BYTE.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.replace('▁', ' ').encode()
