"""StreamDecoder: pieces that join to the whole, never half a character."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from jpt.data.stream import StreamDecoder
from jpt.data.tokenizer import Tokenizer


def pieces(tokenizer, ids, skip_special=True):
    decoder = StreamDecoder(tokenizer, skip_special)
    return [decoder.push([i]) for i in ids] + [decoder.finish()]


@given(st.text())
def test_pieces_join_to_the_text(tokenizer, text):
    parts = pieces(tokenizer, tokenizer.encode(text), skip_special=False)
    assert ''.join(parts) == text


@given(st.lists(st.integers(4, 299)), st.integers(1, 5))
def test_any_ids_in_any_portions(tokenizer, ids, portion):
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(ids[i : i + portion]) for i in range(0, len(ids), portion)]
    assert ''.join([*parts, decoder.finish()]) == tokenizer.decode(ids)


def test_nothing_of_a_character_is_given_out_early(tokenizer):
    ids = [tokenizer.backend.token_to_id(token) for token in ('ð', 'Ł', 'ĺ', 'Ģ')]  # the bytes F0 9F 98 80
    assert pieces(tokenizer, ids) == ['', '', '', '😀', '']
    assert pieces(tokenizer, ids[:2]) == ['', '', '\ufffd']
    a = tokenizer.encode('a')
    assert pieces(tokenizer, [*ids[:2], *a]) == ['', '', '\ufffda', '']


def test_special_tokens_are_left_out_unless_wanted(tokenizer):
    ids = tokenizer.encode('<|turn|>hi<|end|>')
    assert ''.join(pieces(tokenizer, ids)) == 'hi'
    assert ''.join(pieces(tokenizer, ids, skip_special=False)) == '<|turn|>hi<|end|>'


@pytest.fixture(scope='module')
def llama_type():
    """A leading space that the decoder takes off, and bytes as tokens: what Llama 2's tokenizer does."""
    words = ['<s>', '▁a', '▁', 'b', *(f'<0x{byte:02X}>' for byte in range(256))]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.add_special_tokens(['<s>'])
    steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, {}, 'none', 'test', adds_bos=True)


def test_the_leading_space_goes_once(llama_type):
    a, space, b = 1, 2, 3
    assert pieces(llama_type, [a, a, space, b]) == ['a', ' a', ' ', 'b', '']
    assert pieces(llama_type, [0, a, 0, a]) == ['', 'a', '', ' a', '']
    assert pieces(llama_type, [space, a]) == ['', ' a', '']
    assert ''.join(pieces(llama_type, [space, space, a, b])) == llama_type.decode([space, space, a, b])


def test_byte_tokens_wait_for_the_whole_character(llama_type):
    ids = [4 + byte for byte in 'é日'.encode()]
    assert pieces(llama_type, ids) == ['', 'é', '', '', '日', '']
