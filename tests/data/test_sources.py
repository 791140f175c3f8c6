"""Sources: records in, and errors that name file and line."""

import gzip
import json
import lzma
import sys

import numpy as np
import pytest

from jpt.data.indexed import IndexedWriter
from jpt.data.records import Chat, DataError, Fields
from jpt.data.sources import MemorySource, open_source

HI = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'Hello'}]
CHAT = Fields()


def read(source):
    return [source[i] for i in range(len(source))]


def lines(path, *rows, end='\n'):
    path.write_bytes(b''.join((row if isinstance(row, bytes) else row.encode()) + end.encode() for row in rows))
    return str(path)


def test_json_lines_keep_their_numbers_over_blank_ones(tmp_path):
    path = lines(tmp_path / 'a.jsonl', '{"text": "one"}', '', '  ', '{"text": "zwei ü\\n"}', '{"text": 3}')
    source = open_source(path)
    assert [source[0], source[1]] == ['one', 'zwei ü\n']
    assert len(source) == 3
    assert source.place(1) == f'{path}:4'
    with pytest.raises(DataError, match=r"a\.jsonl:5: 'text': expected a string, found int"):
        source[2]


def test_the_last_line_needs_no_end_and_windows_ends_are_taken(tmp_path):
    assert read(open_source(lines(tmp_path / 'a.jsonl', '{"text": "a"}', '{"text": "b"}', end='\r\n'))) == ['a', 'b']
    (tmp_path / 'b.ndjson').write_text('{"text": "a"}\n{"text": "b"}')
    assert read(open_source(str(tmp_path / 'b.ndjson'))) == ['a', 'b']
    (tmp_path / 'c.jsonl').write_text('')
    assert read(open_source(str(tmp_path / 'c.jsonl'))) == []


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"text": "a"', 'not JSON'),
        ('["text"]', 'expected a JSON object, found list'),
        ('{"txt": "a", "id": 1}', "no key 'text'; there are txt, id$"),
        ('{"messages": []}', r"no key 'text'; there are messages \(kind='chat' reads 'messages'\)"),
        (b'{"text": "\xff\xfe......"}', 'not UTF-8'),
        ('{"text": "half \\ud83d"}', 'not Unicode text'),
        ('[' * 100_000, 'not JSON'),
    ],
    ids=range(7),
)
def test_malformed_lines_are_named(tmp_path, line, message):
    source = open_source(lines(tmp_path / 'a.jsonl', '{"text": "fine"}', line))
    assert source[0] == 'fine'
    with pytest.raises(DataError, match=rf'a\.jsonl:2: {message}') as caught:
        source[1]
    assert caught.value.place.endswith('a.jsonl:2')


def test_conversations(tmp_path):
    rows = [{'messages': HI}, {'messages': HI, 'tools': [{'name': 'f'}]}, {'messages': HI[:1]}, {'messages': 'x'}]
    source = open_source(lines(tmp_path / 'a.jsonl', *map(json.dumps, rows)), chat=True)
    assert source[0] == Chat(HI, None)
    assert source[1] == Chat(HI, [{'name': 'f'}])
    with pytest.raises(DataError, match=r'a\.jsonl:3: .*nothing to learn from'):
        source[2]
    with pytest.raises(DataError, match=r'a\.jsonl:4: messages: expected a list'):
        source[3]


def test_tools_are_a_list_of_objects_or_its_json(tmp_path):
    tools = ['[{"name": "f"}]', '', [], '[{"name"', {'name': 'f'}, '"f"']
    rows = [{'messages': HI, 'tools': given} for given in tools]
    source = open_source(lines(tmp_path / 'a.jsonl', *map(json.dumps, rows)), chat=True)
    assert [source[i].tools for i in range(3)] == [[{'name': 'f'}], None, None]
    with pytest.raises(DataError, match=r"a\.jsonl:4: 'tools' is text, but not JSON"):
        source[3]
    for i, kind in ((4, 'dict'), (5, 'str')):
        with pytest.raises(DataError, match=rf"a\.jsonl:{i + 1}: 'tools': expected a list of objects, found {kind}"):
            source[i]


def test_questions_and_answers_make_conversations(tmp_path):
    path = lines(tmp_path / 'a.jsonl', '{"q": "hi", "a": "Hello"}', '{"q": "hi", "a": null}')
    source = open_source(path, Fields(prompt='q', completion='a'), chat=True)
    assert source[0] == Chat(HI)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'a': expected a string, found NoneType"):
        source[1]


def test_text_files_whole_or_cut_at_a_separator(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('<|end|>\nOne\n two\n<|end|>\n\n<|end|>Drei ü', encoding='utf-8')
    assert read(open_source(str(path))) == [path.read_text(encoding='utf-8')]
    assert read(open_source(str(path), separator='<|end|>')) == ['One\n two', 'Drei ü']
    path.write_bytes(b'ok|\xff')
    source = open_source(str(path), separator='|')
    with pytest.raises(DataError, match=r'a\.txt: byte 3: not UTF-8'):
        read(source)


@pytest.mark.parametrize(('suffix', 'opener'), [('.gz', gzip.open), ('.xz', lzma.open)])
def test_compressed_files(tmp_path, suffix, opener):
    for name in ('a.jsonl', 'a.txt'):
        with opener(tmp_path / (name + suffix), 'wb') as file:
            file.write(b'{"text": "x"}\n')
    assert read(open_source(str(tmp_path / ('a.jsonl' + suffix)))) == ['x']
    assert read(open_source(str(tmp_path / ('a.txt' + suffix)))) == ['{"text": "x"}\n']
    whole = (tmp_path / ('a.txt' + suffix)).read_bytes()
    (tmp_path / ('b.txt' + suffix)).write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf'b\.txt\{suffix} cannot be decompressed'):
        open_source(str(tmp_path / ('b.txt' + suffix)))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    messages = [HI, [{'role': 'assistant', 'content': 'a', 'weight': 1.0}]]
    table = pyarrow.table({'text': ['a', None], 'messages': messages, 'unused': [1, 2]})
    path = str(tmp_path / 'a.parquet')
    parquet.write_table(table, path)
    source = open_source(path)
    assert (len(source), source[0]) == (2, 'a')
    with pytest.raises(DataError, match=r"a\.parquet: row 1: no key 'text'"):
        source[1]
    chats = open_source(path, chat=True)
    assert chats[0] == Chat(HI)  # without the weight that only the other row has
    assert chats[1].messages == messages[1]
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body': its columns are text, messages, unused"):
        open_source(path, Fields(text='body'))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.delitem(sys.modules, 'pyarrow.parquet', raising=False)
    (tmp_path / 'a.parquet').write_bytes(b'')
    with pytest.raises(ImportError, match=r"a\.parquet: parquet files need pyarrow: pip install 'jpt\[parquet\]'"):
        open_source(str(tmp_path / 'a.parquet'))


def test_indexed_tokens_by_any_of_their_names(tmp_path):
    with IndexedWriter(tmp_path / 'x', vocab_size=300) as writer:
        writer.add([5, 6, 7])
        writer.add([8])
    for name in ('x', 'x.bin', 'x.idx'):
        source = open_source(str(tmp_path / name))
        assert [ids.tolist() for ids in read(source)] == [[5, 6, 7], [8]]
        assert source.sizes(np.array([1, 0])).tolist() == [1, 3]
        assert source.place(1).endswith('x.bin: document 1')


def test_patterns_read_their_files_by_name(tmp_path):
    for name, texts in (('b', 'cd'), ('a', 'ab'), ('c', 'e')):
        lines(tmp_path / f'{name}.jsonl', *(json.dumps({'text': text}) for text in texts))
    lines(tmp_path / 'empty.jsonl')
    source = open_source(str(tmp_path / '*.jsonl'))
    assert read(source) == list('abcde')
    assert source.place(3).endswith('b.jsonl:2')
    assert source.sizes(np.array([4, 0, 2])).tolist() == [len('{"text": "a"}') // 4 + 1] * 3


def test_what_is_not_there_or_not_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.paths: .*none\*\.jsonl' is no file"):
        open_source(str(tmp_path / 'none*.jsonl'))
    (tmp_path / 'a.csv').write_text('a')
    with pytest.raises(ValueError, match=r"a\.csv: unknown kind of file '\.csv': expected \.jsonl"):
        open_source(str(tmp_path / 'a.csv'))
    (tmp_path / 'a.txt').write_text('a')
    with pytest.raises(ValueError, match=r'a\.txt: conversations come from JSON lines or parquet'):
        open_source(str(tmp_path / 'a.txt'), chat=True)


def test_the_standard_library_is_a_source():
    source = open_source('stdlib:held_out')
    assert len(source) > 1
    assert all(isinstance(text, str) for text in read(source))


def test_fingerprints_follow_the_content(tmp_path):
    one = MemorySource(['a', 'b'], 'one').fingerprint()
    assert MemorySource(['a', 'b'], 'other name').fingerprint() == one
    assert MemorySource(['a', 'c']).fingerprint() != one
    assert MemorySource(['a', 'b', 'b']).fingerprint() != one
    broken = open_source(lines(tmp_path / 'a.jsonl', '{'))
    assert len(broken.fingerprint()) == 16
