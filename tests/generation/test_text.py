"""Pieces of text against the text of the whole, for a decoder of bytes and one that drops the first space."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpt.generation.text import Detokenizer, StopScanner

TEXTS = st.text(alphabet='ab é漢🙂\n', max_size=24)
CUTS = st.lists(st.integers(1, 5), max_size=12)


def decode_bytes(ids):
    """A byte-level decoder: every id is a byte, parts of characters show as U+FFFD."""
    return bytes(ids).decode('utf-8', errors='replace')


WORDS = ['▁a', 'b', '▁', '▁stop', 'st', 'op', '!']


def decode_words(ids):
    """A SentencePiece-like decoder: the space before the first word is dropped."""
    return ''.join(WORDS[i] for i in ids).replace('▁', ' ').removeprefix(' ')


def cut_up(ids, cuts):
    """The ids in chunks of the given sizes, the rest at the end."""
    chunks, start = [], 0
    for size in cuts:
        chunks.append(ids[start : start + size])
        start += size
    return [*chunks, ids[start:]]


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, CUTS)
def test_pieces_of_bytes_join_to_the_text_and_are_whole_characters(prompt, text, cuts):
    detokenizer = Detokenizer(decode_bytes, list(prompt.encode()))
    pieces = [detokenizer.push(chunk) for chunk in cut_up(list(text.encode()), cuts)]
    assert '\ufffd' not in ''.join(pieces)
    assert ''.join([*pieces, detokenizer.flush()]) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.lists(st.integers(0, 6), max_size=24), CUTS)
def test_pieces_follow_the_prompt_as_the_whole_text_does(prompt, ids, cuts):
    detokenizer = Detokenizer(decode_words, prompt)
    pieces = [detokenizer.push(chunk) for chunk in cut_up(ids, cuts)]
    before = decode_words(prompt[-8:])
    assert before + ''.join([*pieces, detokenizer.flush()]) == decode_words(prompt[-8:] + ids)


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    detokenizer = Detokenizer(decode_bytes)
    assert detokenizer.push(list(b'ok \xf0\x9f')) == ''
    assert detokenizer.push([]) == ''
    assert detokenizer.flush() == 'ok \ufffd'
    assert detokenizer.flush() == ''


def test_a_character_that_the_prompt_left_open_is_completed():
    emoji = '🙂'.encode()
    detokenizer = Detokenizer(decode_bytes, list(b'hm ' + emoji[:2]))
    assert detokenizer.push(list(emoji[2:])) == '🙂'
    assert detokenizer.push(list(b'!')) == '!'


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet='abé', max_size=20),
    st.lists(st.text(alphabet='abé', min_size=1, max_size=4), max_size=3),
    CUTS,
)
def test_the_text_ends_before_the_first_stop_string_wherever_the_chunks_end(text, stop, cuts):
    ids = list(text.encode())
    scanner = StopScanner(decode_bytes, [], stop)
    shown, used, finished = '', 0, False
    for chunk in cut_up(ids, cuts):
        piece = scanner.push(chunk)
        shown, used, finished = shown + piece.text, used + piece.used, piece.stopped
        assert text.startswith(shown)
        if finished:
            break
    shown += scanner.flush().text
    # The shortest beginning of the text that holds a stop string, and what lies before the string that begins first.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if ends:
        beginning = text[: ends[0]]
        assert finished
        assert used == len(beginning.encode())
        assert shown == beginning[: min(beginning.find(s) for s in stop if s in beginning)]
    else:
        assert not finished
        assert shown == text


def test_what_may_begin_a_stop_string_is_held_back_and_then_shown():
    scanner = StopScanner(decode_words, [], ['stop!'])
    assert scanner.push([0, 4, 5]).text == 'a'
    assert scanner.push([5]).text == 'stopop'
    assert scanner.push([3]).text == ' '
    piece = scanner.push([6, 0, 0])
    assert (piece.text, piece.used, piece.stopped) == ('', 1, True)
    assert scanner.flush() == ('', 0, True)


@pytest.mark.parametrize('stop', [[], ['zz']])
def test_without_a_stop_in_sight_everything_counts(stop):
    scanner = StopScanner(decode_bytes, [], stop)
    assert scanner.push(list(b'abc')) == ('abc', 3, False)
    assert scanner.push([]) == ('', 0, False)
