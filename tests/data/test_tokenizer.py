"""Tokenizer: files of model folders in, ids and text out."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpt.data.tokenizer import Tokenizer, copy_tokenizer_files


def test_the_folder_says_which_tokens_are_special(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 0, 1)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.vocab_size == 300
    assert tokenizer.adds_bos is False


def test_encode_adds_only_what_is_asked_for(tokenizer):
    plain = tokenizer.encode('hi')
    assert tokenizer.encode('hi', bos=True, eos=True) == [3, *plain, 0]
    assert tokenizer.encode('') == []
    assert tokenizer.encode('<|bos|>hi<|end|>') == [3, *plain, 0]
    assert tokenizer.encode_batch(['hi', ''], eos=True) == [[*plain, 0], [0]]
    assert tokenizer.decode([3, *plain, 0]) == '<|bos|>hi<|end|>'
    assert tokenizer.decode([3, *plain, 0], skip_special=True) == 'hi'


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_offsets_cover_the_text(tokenizer):
    text = ' naïve  日\n\n'
    [(ids, offsets)] = tokenizer.encode_with_offsets([text])
    assert len(ids) == len(offsets)
    seen = {k for start, end in offsets for k in range(start, end)}
    assert seen == set(range(len(text)))  # white space too


def test_ids_past_the_vocabulary_stand_for_no_text(tokenizer):
    hi = tokenizer.encode('hi')
    assert tokenizer.decode([300, *hi, 99_999]) == 'hi'  # a padded embedding has such rows
    with pytest.raises(ValueError, match=r'id -1: the vocabulary of .* begins with id 0'):
        tokenizer.decode([5, -1])


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path, write_tokenizer):
    truncation = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
    padding = {
        'strategy': {'Fixed': 64}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 1, 'pad_type_id': 0,
        'pad_token': '<|pad|>',
    }  # fmt: skip
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, {}, truncation=truncation, padding=padding))
    assert tokenizer.decode(tokenizer.encode('more than two tokens')) == 'more than two tokens'


def test_tokens_may_be_written_as_objects_and_in_either_file(tmp_path, write_tokenizer):
    folder = write_tokenizer(tmp_path, {'eos_token': {'content': '<|end|>', 'lstrip': False}})
    (folder / 'special_tokens_map.json').write_text(json.dumps({'bos_token': '<|bos|>', 'eos_token': '<|pad|>'}))
    (folder / 'chat_template.jinja').write_text('{{ eos_token }}')
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 0, None)
    assert tokenizer.chat_template().render([{'role': 'user', 'content': ''}]) == '<|end|>'


def test_whether_bos_is_added_comes_from_the_config_or_the_post_processor(tmp_path, write_tokenizer):
    bos = {'SpecialToken': {'id': '<|bos|>', 'type_id': 0}}
    post = {
        'type': 'TemplateProcessing',
        'single': [bos, {'Sequence': {'id': 'A', 'type_id': 0}}],
        'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
        'special_tokens': {'<|bos|>': {'id': '<|bos|>', 'ids': [3], 'tokens': ['<|bos|>']}},
    }
    config = {'bos_token': '<|bos|>'}
    assert Tokenizer.load(write_tokenizer(tmp_path / 'a', config, post_processor=post)).adds_bos is True
    assert (
        Tokenizer.load(write_tokenizer(tmp_path / 'b', config | {'add_bos_token': False}, post_processor=post)).adds_bos
        is False
    )
    assert Tokenizer.load(write_tokenizer(tmp_path / 'c', config | {'add_bos_token': True})).adds_bos is True
    assert Tokenizer.load(tmp_path / 'a').encode('hi') == Tokenizer.load(tmp_path / 'c').encode('hi')


def test_tokens_that_only_the_config_lists_are_added_under_their_id(tmp_path, write_tokenizer):
    listed = {'300': {'content': '<|new|>', 'special': True}, '301': {'content': 'plain', 'special': False}}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, {'added_tokens_decoder': listed}))
    assert tokenizer.encode('<|new|>plain') == [300, 301]
    assert tokenizer.vocab_size == 302
    with pytest.raises(ValueError, match=r"'<\|new\|>' should have id 305"):
        Tokenizer.load(write_tokenizer(tmp_path, {'added_tokens_decoder': {'305': {'content': '<|new|>'}}}))


def test_the_fingerprint_is_of_the_vocabulary_not_of_the_file(tmp_path, tokenizer, golden, write_tokenizer):
    content = golden['tokenizer']
    expected = {key: value for key, value in content.items() if key not in ('truncation', 'padding')}
    text = json.dumps(expected, sort_keys=True, separators=(',', ':'))
    assert tokenizer.fingerprint() == hashlib.sha256(text.encode()).hexdigest()
    merges = [' '.join(merge) for merge in content['model']['merges']]
    older = content['model'] | {'merges': merges}
    assert Tokenizer.load(write_tokenizer(tmp_path, {}, model=older)).fingerprint() == tokenizer.fingerprint()
    other = Tokenizer.load(write_tokenizer(tmp_path, {}, added_tokens=content['added_tokens'][:3]))
    assert other.fingerprint() != tokenizer.fingerprint()


def test_gpt2_files_give_the_same_ids_as_tokenizer_json(tmp_path, tokenizer, golden):
    model = golden['tokenizer']['model']
    vocab = dict(model['vocab']) | {'<|endoftext|>': 300}
    (tmp_path / 'vocab.json').write_text(json.dumps(vocab))
    lines = ['#version: 0.2', *(' '.join(merge) for merge in model['merges'])]
    (tmp_path / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    gpt2 = Tokenizer.load(tmp_path)
    text = "It's  naïve: 日本\n\n 12"
    assert gpt2.encode(text) == tokenizer.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode('a<|endoftext|>')[-1] == 300
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id) == (300, 300, None)


def test_gpt2_itself(shared_data):
    gpt2 = Tokenizer.load(shared_data / 'tokenizers' / 'gpt2')
    assert gpt2.encode('Hello world') == [15496, 995]  # as published with the model
    assert gpt2.encode(' world<|endoftext|>') == [995, 50256]
    assert gpt2.vocab_size == 50257


def test_folders_without_a_readable_tokenizer_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none, which is not a folder: expected tokenizer\.json'):
        Tokenizer.load(tmp_path / 'none')
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match=r'holds config\.json'):
        Tokenizer.load(tmp_path)
    (tmp_path / 'tokenizer.model').write_bytes(b'')
    with pytest.raises(FileNotFoundError, match=r'tokenizer\.model is a SentencePiece model'):
        Tokenizer.load(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r'tokenizer\.json is not a file of the tokenizers package'):
        Tokenizer.load(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match=r'tokenizer\.json is not JSON'):
        Tokenizer.load(tmp_path)


def test_a_special_token_outside_of_the_vocabulary_is_an_error(tmp_path, write_tokenizer):
    with pytest.raises(ValueError, match=r"eos_token '</s>' of .* is not in its vocabulary"):
        Tokenizer.load(write_tokenizer(tmp_path, {'eos_token': '</s>'}))


def test_asking_for_what_a_tokenizer_lacks(tmp_path, write_tokenizer):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    with pytest.raises(ValueError, match='names no eos_token'):
        tokenizer.encode('a', eos=True)
    with pytest.raises(ValueError, match='no chat template'):
        tokenizer.chat_template()


def test_templates_may_come_as_a_list_of_names(tmp_path, write_tokenizer):
    entries = [{'name': 'default', 'template': 'D'}, {'name': 'tool_use', 'template': 'T'}]
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, {'chat_template': entries}))
    assert tokenizer.chat_template('tool_use').render([]) == 'T'
    with pytest.raises(ValueError, match="no chat template 'rag': it has default, tool_use"):
        tokenizer.chat_template('rag')


def test_files_are_copied_byte_for_byte(tmp_path, tokenizer_folder):
    names = copy_tokenizer_files(tokenizer_folder, tmp_path / 'new')
    assert names == ['tokenizer.json', 'tokenizer_config.json']
    for name in names:
        assert (tmp_path / 'new' / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert copy_tokenizer_files(tmp_path / 'new', tmp_path / 'new') == names  # onto itself
    with pytest.raises(FileNotFoundError, match='no tokenizer files'):
        copy_tokenizer_files(tmp_path, tmp_path / 'other')
