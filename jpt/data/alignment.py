"""A teacher with a tokenizer of its own, beside the student: the same text in its tokens, and where both are as far.

A position has read some text and predicts what follows it. A student's position is aligned with the teacher's that has
read exactly the same characters, so that both predict from the same place; where the tokens of one end within those
of the other there is none. A token that is part of a character begins nowhere.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jpt.data.tokenizer import Tokenizer
from jpt.data.words import ROLES, shared_words, word_bytes


class TeacherTokens(NamedTuple):
    """What a teacher reads beside a batch [B, T]: rows [B, U] of its own tokens; numpy or jax arrays, int32.

    at: [B, T], of every position of the student the position in the teacher's row that has read the same text, or -1.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    at: Any


class Reading(NamedTuple):
    """A document of n of the student's tokens as the teacher reads it.

    ids: int32 [m]. at: int32 [n - 1], of every position of the student the teacher's, or -1.
    """

    ids: np.ndarray
    at: np.ndarray


class Rendered(Protocol):
    """A conversation as text, with the characters [start, end) of each answer and its weight; see RenderedChat."""

    @property
    def text(self) -> str: ...
    @property
    def answers(self) -> Sequence[tuple[tuple[int, int], float]]: ...


class SecondReader:
    """Reads documents with the tokenizer of a teacher."""

    def __init__(self, student: Tokenizer, teacher: Tokenizer, length: int):
        """length: U, tokens of the teacher in a row. Raises ValueError for a vocabulary whose bytes are not known."""
        self.length, self.tokenizer, self.student = length, teacher, student
        self._rules = _Rules.of(student), _Rules.of(teacher)

    @functools.cached_property
    def shared_words(self) -> np.ndarray:
        """The student's id of every word of the teacher, or -1; see words.py."""
        return shared_words(self.student, self.tokenizer)

    @functools.cached_property
    def own_words(self) -> np.ndarray:
        """Which words of the student add something to a text and have no partner: bool [V of student]."""
        found = np.array([word is not None for word in word_bytes(self.student)])
        found[self.shared_words[self.shared_words >= 0]] = False
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Whatever decides what stands beside the student's tokens."""
        own = self.tokenizer
        roles = [own.role_id(role) for role in ROLES]
        return {'tokenizer': own.fingerprint(), 'adds_bos': own.adds_bos, 'roles': roles, 'length': self.length}

    def read(self, texts: Sequence[str], bos: bool, eos: bool) -> list[tuple[list[int], Reading]]:
        """The student's ids of texts, with its bos and eos where asked, and how the teacher reads them.

        The teacher's texts begin with its bos where its own tokenizer puts one there. Its end of a text is a word
        that it may predict, and none that it reads.
        """
        before = [self.student.required_id('bos_token')] if bos else []
        after = [self.student.required_id('eos_token')] if eos else []
        first = [self.tokenizer.required_id('bos_token')] if self.tokenizer.adds_bos else []
        found = []
        for (ours, our_begins), (theirs, their_begins) in zip(*self._encoded(texts, texts), strict=True):
            ids = [*before, *ours, *after]
            at = align(our_begins[1 - len(before) :][: len(ids) - 1], their_begins[1 - len(first) :])
            found.append((ids, Reading(np.array([*first, *theirs], np.int32), at)))
        return found

    def read_answers(self, pairs: Sequence[tuple[Rendered, Rendered]], sizes: Sequence[int]) -> list[Reading]:
        """How the teacher reads conversations, from what the templates of both write; aligned within answers alone.

        pairs: the student's text with the characters [start, end) of its answers, and the teacher's. sizes: how many
        tokens the student has of each. An answer is aligned as far as both templates write it alike.
        """
        found = []
        both = self._encoded([ours.text for ours, _ in pairs], [theirs.text for _, theirs in pairs])
        for pair, size, (_, our_begins), (theirs, their_begins) in zip(pairs, sizes, *both, strict=True):
            ours, others = _common_places(pair, (our_begins, their_begins))
            found.append(Reading(np.array(theirs, np.int32), align(ours[1:size], others[1:])))
        return found

    def _encoded(self, ours: Sequence[str], theirs: Sequence[str]) -> Iterator[list[tuple[list[int], np.ndarray]]]:
        """Of both sides the ids of every text and where its tokens begin."""
        for tokenizer, rules, texts in zip((self.student, self.tokenizer), self._rules, (ours, theirs), strict=True):
            encoded = zip(texts, tokenizer.encode_with_offsets(texts), strict=True)
            yield [(ids, rules.begins(text, ids, offsets)) for text, (ids, offsets) in encoded]

    def row(self, pieces: Sequence[tuple[Reading, int, int]], seq_len: int) -> TeacherTokens:
        """A row [U] beside one of the student's [T], from its pieces (Reading, start, length) side by side.

        Tokens that do not fit are left out, and the student's positions that need them are aligned with none.
        """
        row = self.empty((), seq_len)
        free = position = 0
        for segment, (reading, start, length) in enumerate(pieces, 1):
            ids, at = part(reading, start, length, self.length - free)
            row.tokens[free : free + len(ids)] = ids
            row.positions[free : free + len(ids)] = np.arange(len(ids))
            row.segment_ids[free : free + len(ids)] = segment
            row.at[position : position + length] = np.where(at >= 0, at + free, -1)
            free, position = free + len(ids), position + length
        return row

    def empty(self, leading: tuple[int, ...], seq_len: int) -> TeacherTokens:
        """Rows [*leading, U] without a text."""
        pad = next(i for i in (self.tokenizer.pad_id, self.tokenizer.eos_id, 0) if i is not None)
        shape = (*leading, self.length)
        return TeacherTokens(
            tokens=np.full(shape, pad, np.int32),
            positions=np.zeros(shape, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            at=np.full((*leading, seq_len), -1, np.int32),
        )


def _common_places(pair: tuple[Rendered, Rendered], begins: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Characters of two texts as places in the answers that are common to both, -1 outside of them."""
    places = [np.full(own.shape, -1, np.int64) for own in begins]
    offset = 0
    for spans in zip(*(side.answers for side in pair), strict=True):
        starts = [start for (start, _), _ in spans]
        answers = [side.text[start:end] for side, ((start, end), _) in zip(pair, spans, strict=True)]
        length = common_length(*answers)
        for place, own, start in zip(places, begins, starts, strict=True):
            inside = (own >= start) & (own <= start + length)
            place[inside] = own[inside] - start + offset
        offset += length + 1
    return places


def common_length(a: str, b: str) -> int:
    """Of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def align(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of every position the other side's whose next token begins at the same character, or -1; int32, as `ours`.

    Both are what `_Rules.begins` says of the token that follows each position. Where several positions are before the
    same character (tokens of no character lie between), the last has read most and counts.
    """
    places, values = _last_of_each(ours)
    other_places, other_values = _last_of_each(theirs)
    found = np.searchsorted(other_values, values)
    same = found < len(other_values)
    same[same] = other_values[found[same]] == values[same]
    at = np.full(len(ours), -1, np.int32)
    at[places[same]] = other_places[found[same]]
    return at


def part(reading: Reading, start: int, length: int, room: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [k], at [length]): what the teacher reads, of at most `room` tokens, beside a piece of a document.

    A piece that begins within a document is read from the first place that is a token's beginning for both, as far as
    a position of the student looks.
    """
    at, first = reading.at[start : start + length], 0
    if start:
        common = reading.at[start - 1 : start + length]
        common = common[common >= 0]
        first = int(common[0]) + 1 if len(common) else len(reading.ids)
    at = np.where((at >= first) & (at - first < room), at - first, -1)
    return reading.ids[first : first + int(at.max(initial=-1)) + 1], at


def _last_of_each(begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places, values) of the entries that are not -1, of equal ones the last."""
    places = np.flatnonzero(begins >= 0)
    values = begins[places]
    last = np.append(values[1:] != values[:-1], True)[: len(values)]
    return places[last], values[last]


class _Rules(NamedTuple):
    """Of a tokenizer: which words begin with a space, and whether it puts one in front of a text."""

    spaced: np.ndarray  # bool [V]
    prefixes: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> '_Rules':
        words = word_bytes(tokenizer)
        spaced = np.array([word is not None and word.startswith(b' ') for word in words])
        return cls(spaced, bool(spaced[tokenizer.encode('a')[:1]].any()))

    def begins(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> np.ndarray:
        """The character that each token begins with [n + 1], the last being the end of the text.

        -1 where that is within a token (it shares a character with one before), or where a space that the text has
        not belongs to the token: there a word with a space stands for one without.
        """
        first, last = np.array(offsets, np.int64).reshape(-1, 2).T
        first, read = np.append(first, len(text)), np.append(0, np.maximum.accumulate(last))
        letters = np.append(np.frombuffer(text.encode('utf-32-le'), np.uint32), ord(' '))
        unread = np.append(self.spaced[np.array(ids, np.int64)], False) & (letters[first] != ord(' '))
        if self.prefixes:
            unread |= (first == 0) & (len(text) > 0)
        return np.where((read <= first) & ~unread, first, -1)
