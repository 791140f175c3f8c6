"""The standard library as a corpus: fixed lists, disjoint splits, errors that name files; and the tokenizer on it."""

import hashlib
import json
import pathlib
import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import jpt.data.stdlib_corpus as corpus
from jpt.data import stdlib_lists, train_tokenizer

VERSIONS = ('3.11', '3.12')
ASSETS = pathlib.Path(corpus.__file__).parents[1] / 'assets' / 'quickstart_teacher'


def write_files(root: pathlib.Path, version: str, split: str) -> dict[str, bytes]:
    """A made-up standard library that has every listed name with other content; returns {name: content}."""
    _, names = corpus.read_list(split, version)
    contents = {name: f'# {name}\npass\n'.encode() for name in names}
    for name, raw in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return contents


@pytest.fixture(scope='module')
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(ASSETS / 'tokenizer.json'))


@pytest.mark.parametrize('version', VERSIONS)
def test_lists_are_sorted_disjoint_and_listable(version):
    made_from, train = corpus.read_list('train', version)
    _, held_out = corpus.read_list('held_out', version)
    assert made_from.startswith(f'{version}.')
    assert not set(train) & set(held_out)
    for names in (train, held_out):
        assert list(names) == sorted(names)
        assert all(stdlib_lists.is_listed(name) for name in names)
        assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in names.values())
    assert set(held_out) == stdlib_lists.HELD_OUT


def test_no_version_trains_on_a_held_out_file_of_another():
    """One teacher serves both versions, so content, not only names, must stay apart: no shared hash across splits."""
    hashes = {
        split: {digest for version in VERSIONS for digest in corpus.read_list(split, version)[1].values()}
        for split in corpus.SPLITS
    }
    names = {split: {n for v in VERSIONS for n in corpus.read_list(split, v)[1]} for split in corpus.SPLITS}
    assert not hashes['train'] & hashes['held_out']
    assert not names['train'] & names['held_out']


def test_running_interpreter_has_every_file():
    train = corpus.read_stdlib('train')
    held_out = corpus.read_stdlib('held_out')
    train_bytes, held_bytes = (sum(len(text.encode()) for text in each.texts) for each in (train, held_out))
    assert 7e6 < train_bytes < 10e6
    assert 0.03 < held_bytes / (train_bytes + held_bytes) < 0.05
    # Against the interpreter's own idea of where a module's source is, and what it holds.
    assert held_out.texts[held_out.names.index('heapq.py')] == pathlib.Path(shutil.__file__).with_name(
        'heapq.py'
    ).read_text(encoding='utf-8')
    assert corpus.load_stdlib('held_out') == list(held_out.texts)
    # A patch release edits some files, never most of them.
    assert len(train.changed) < len(train.names) / 2


def test_hash_is_sha256_and_ignores_the_platforms_line_ends():
    # echo -n 'a\nb\n' | sha256sum
    known = hashlib.sha256(b'a\nb\n').hexdigest()
    assert corpus.file_hash(b'a\nb\n') == known
    assert corpus.file_hash(b'a\r\nb\r\n') == known
    assert corpus.file_hash(b'a\nc\n') != known
    # The published SHA-256 of the empty message (FIPS 180-4 test vectors).
    assert corpus.file_hash(b'') == 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'


def test_changed_files_are_used_and_counted(tmp_path):
    contents = write_files(tmp_path, '3.11', 'held_out')
    found = corpus.read_stdlib('held_out', root=tmp_path, version='3.11')
    assert found.texts == tuple(contents[name].decode() for name in found.names)
    assert found.changed == found.names
    line = found.describe()
    assert '14 files' in line
    assert '14 of them differ from Python 3.11.7' in line
    assert 'asyncio/queues.py' in line
    with pytest.raises(ValueError, match=r'14 files .* differ from Python 3\.11\.7: asyncio/queues\.py, calendar\.py'):
        corpus.read_stdlib('held_out', root=tmp_path, version='3.11', exact=True)


def test_missing_files_are_all_named(tmp_path):
    write_files(tmp_path, '3.12', 'held_out')
    (tmp_path / 'heapq.py').unlink()
    (tmp_path / 'html' / 'parser.py').unlink()
    with pytest.raises(FileNotFoundError, match=r'2 of 14 files are not in .*: heapq\.py, html/parser\.py'):
        corpus.read_stdlib('held_out', root=tmp_path, version='3.12')


def test_undecodable_file_is_named(tmp_path):
    write_files(tmp_path, '3.12', 'held_out')
    (tmp_path / 'csv.py').write_bytes(b'# caf\xe9\n')
    with pytest.raises(ValueError, match=r'csv\.py is not UTF-8'):
        corpus.read_stdlib('held_out', root=tmp_path, version='3.12')


def test_unknown_split_and_version_say_what_is_allowed():
    with pytest.raises(ValueError, match="split='test': expected one of train, held_out"):
        corpus.read_list('test')
    with pytest.raises(ValueError, match=r'no list for Python 2\.7 .* py311, py312'):
        corpus.read_list('train', '2.7')


def test_a_list_is_made_from_names_alone(tmp_path):
    for name in (*stdlib_lists.HELD_OUT, 'os.py', 'json/encoder.py'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'x' * 200)
    for name in ('test/test_os.py', 'tkinter/dialog.py', '_sysconfigdata_x.py', 'json/tests/test_a.py', 'turtle.py'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'x' * 200)
    (tmp_path / 'small.py').write_bytes(b'x' * 199)
    content = stdlib_lists.make_list(tmp_path, '3.99.1')
    assert content['made_from'] == '3.99.1'
    assert list(content['train']) == ['json/encoder.py', 'os.py']
    assert set(content['held_out']) == stdlib_lists.HELD_OUT
    (tmp_path / 'csv.py').unlink()
    with pytest.raises(FileNotFoundError, match=r'csv\.py'):
        stdlib_lists.make_list(tmp_path, '3.99.1')


def test_shipped_tokenizer_has_the_fixed_ids_and_cuts(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.token_to_id(token) for token in train_tokenizer.SPECIAL_TOKENS] == [0, 1, 2, 3]
    config = json.loads((ASSETS / 'tokenizer_config.json').read_text())
    assert tokenizer.token_to_id(config['eos_token']) == 0
    assert tokenizer.token_to_id(config['pad_token']) == 1
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode('    def run(self):\n        return 2024\n').ids]
    assert pieces == ['    ', 'def', ' run', '(self', '):', '\n        ', 'return', ' ', '2', '0', '2', '4', '\n']
    # A prompt that stops after the indentation is a prefix of the longer text's ids.
    assert pieces[:6] == [tokenizer.decode([i]) for i in tokenizer.encode('    def run(self):\n        ').ids]


def test_shipped_tokenizer_compresses_held_out_text(tokenizer):
    texts = corpus.load_stdlib('held_out')
    ids = [tokenizer.encode(text).ids for text in texts]
    size = sum(len(text.encode()) for text in texts)
    assert size / sum(len(each) for each in ids) > 3.3
    assert [tokenizer.decode(each, skip_special_tokens=False) for each in ids] == texts
    assert train_tokenizer.bytes_per_token(tokenizer, texts) == pytest.approx(size / sum(map(len, ids)))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_shipped_tokenizer(tokenizer, text):
    special = any(token in text for token in train_tokenizer.SPECIAL_TOKENS)
    assert special or tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_repeatable_and_small_vocabularies_are_refused():
    texts = ['def f(x):\n    return x\n' * 20, 'class A:\n    pass\n' * 20]
    first, second = (train_tokenizer.train_tokenizer(texts, 290) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.token_to_id('return') is not None
    with pytest.raises(ValueError, match='vocab_size=259: expected at least 260'):
        train_tokenizer.train_tokenizer(texts, 259)
