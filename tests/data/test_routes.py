"""Records that name their teacher: the name stays with every position, whatever becomes of the rows."""

import itertools
import json

import jax
import numpy as np
import pytest

from jpt.data.indexed import IndexedWriter
from jpt.data.pipeline import DataConfig, make_pipeline
from jpt.data.records import Chat, DataError, Fields, Routed
from jpt.data.sources import MemorySource, open_source

NAMES = ('code', 'math', 'prose')
# A text says itself which teacher it has: '<name> 7 7 7 ...'
TEXTS = [Routed(f'{NAMES[i % 7 % 3]}:' + f' {i}' * (1 + 5 * i % 13), NAMES[i % 7 % 3]) for i in range(40)]
TURNS = [[{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text}] for text, _ in TEXTS[:20]]
CHATS = [Routed(Chat(turns), name) for turns, (_, name) in zip(TURNS, TEXTS, strict=False)]


def make(tokenizer, records=TEXTS, *, seq_len=200, config=None, routes=NAMES, **arguments):
    sources = [MemorySource(records)] if isinstance(records[0], Routed | str) else records
    chat = {'kind': 'chat'} if isinstance(records[0], Routed) and isinstance(records[0].record, Chat) else {}
    settings = {'window_rows': 3, 'prefetch': 0, 'route_key': 'subject'} | chat | (config or {})
    given = {'batch_size': 4, 'routes': routes} | arguments
    return make_pipeline(DataConfig(**settings), tokenizer, seq_len=seq_len, sources=sources, **given)


def routes_by_segment(tokenizer, batches):
    """(decoded text, the routes of its positions) of every segment."""
    for batch in batches:
        assert batch.route.dtype == np.int32
        assert not batch.route[batch.segment_ids == 0].any()
        for row in range(len(batch.tokens)):
            for s in range(1, batch.segment_ids[row].max(initial=0) + 1):
                where = batch.segment_ids[row] == s
                yield tokenizer.decode(batch.tokens[row, where]), batch.route[row, where].tolist()


@pytest.mark.parametrize(
    ('records', 'packing'),
    [(TEXTS, 'best_fit'), (TEXTS, 'concat'), (TEXTS, 'none'), (CHATS, 'best_fit'), (CHATS, 'none')],
)
def test_every_document_keeps_its_own(tokenizer, records, packing):
    batches = list(make(tokenizer, records, config={'packing': packing}, num_epochs=1))
    if packing != 'none':
        assert any(len(set(row[ids > 0])) > 1 for b in batches for row, ids in zip(b.route, b.segment_ids, strict=True))
    seen = set()
    for text, routes in routes_by_segment(tokenizer, batches):
        named = [name for name in NAMES if f'{name}:' in text]
        assert len(set(routes)) == 1
        if named:  # else a piece behind the first of a document that was cut
            assert routes[0] == NAMES.index(named[0])
            seen.add(text)
    assert len(seen) == len(records)


def test_pieces_of_a_document_that_is_cut_have_its_route(tokenizer):
    config = {'packing': 'concat', 'shuffle': False}
    batches = list(make(tokenizer, seq_len=16, config=config, num_epochs=1, batch_size=1))
    found = [int(route) for batch in batches for route in batch.route[batch.segment_ids > 0]]
    wanted = [[NAMES.index(name)] * (len(tokenizer.encode(text, eos=True)) - 1) for text, name in TEXTS]
    assert found == list(itertools.chain(*wanted))


def test_hosts_and_a_place_to_resume_from(tokenizer):
    alone = make(tokenizer, seq_len=48, seed=5, num_epochs=2)
    pair = [make(tokenizer, seq_len=48, seed=5, num_epochs=2, process_index=p, process_count=2) for p in (0, 1)]
    batches, states = [], []
    for batch in alone:
        halves = [next(pipeline) for pipeline in pair]
        jax.tree.map(lambda whole, *parts: np.testing.assert_array_equal(whole, np.concatenate(parts)), batch, *halves)
        batches.append(batch)
        states.append(json.dumps(alone.get_state()))
        assert {json.dumps(pipeline.get_state()) for pipeline in pair} == {states[-1]}
    resumed = make(tokenizer, seq_len=48, seed=5, num_epochs=2)
    for step in (2, 0):
        resumed.set_state(json.loads(states[step]))
        np.testing.assert_array_equal(next(resumed).route, batches[step + 1].route)


def test_a_place_belongs_to_its_routes_and_none_to_data_without(tokenizer):
    state = make(tokenizer).get_state()
    make(tokenizer, routes=NAMES[::-1]).set_state(state)  # their order may change
    with pytest.raises(ValueError, match=r"saved with routes=.*'prose'"):
        make(tokenizer, routes=(*NAMES, 'law')).set_state(state)
    plain = make(tokenizer, ['a text'], config={'route_key': ''}, routes=())
    assert next(plain).route is None
    assert not {'route_key', 'routes'} & set(plain.get_state()['data'])  # so that places of before stay good


@pytest.mark.parametrize(
    ('route', 'message'),
    [
        ('law', r"memory\[2\]: 'subject' is 'law': expected one of code, math, prose"),
        (None, r"memory\[2\]: no teacher in 'subject': expected one of code, math, prose"),
        (['code'], r"memory\[2\]: 'subject' is \['code'\]: expected one of"),
    ],
)
def test_records_of_no_teacher_are_malformed(tokenizer, route, message):
    records = [*TEXTS[:2], Routed('of nobody', route), *TEXTS[2:5]]
    with pytest.raises(DataError, match=message):
        next(make(tokenizer, records))
    pipeline = make(tokenizer, records, config={'malformed': 'skip'}, num_epochs=1)
    texts = [text for text, _ in routes_by_segment(tokenizer, pipeline)]
    assert len(texts) == 5
    assert not any('of nobody' in text for text in texts)
    assert pipeline.progress()['skipped'] == 1


def test_a_record_without_the_field_at_all_is_malformed_too(tokenizer):
    with pytest.raises(DataError, match=r"memory\[0\]: no teacher in 'subject'"):
        next(make(tokenizer, ['a text']))


def test_a_key_and_names_go_together(tokenizer):
    with pytest.raises(ValueError, match=r"route_key='': expected a key where there are routes: code, math, prose"):
        make(tokenizer, config={'route_key': ''})
    with pytest.raises(ValueError, match=r"route_key='subject': .* where there are routes: none"):
        make(tokenizer, routes=())


def test_json_lines_and_parquet_have_fields_and_others_are_refused(tmp_path, tokenizer):
    pyarrow, parquet = (pytest.importorskip(name) for name in ('pyarrow', 'pyarrow.parquet'))

    fields = Fields(route='subject')
    rows = [{'text': text, 'subject': name} for text, name in TEXTS[:3]] + [{'text': 'nobody'}]
    lines, table = tmp_path / 'a.jsonl', tmp_path / 'a.parquet'
    lines.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (lines, table):
        source = open_source(str(path), fields)
        assert [source[i] for i in range(4)] == [*TEXTS[:3], Routed('nobody', None)]
    chats = tmp_path / 'chats.jsonl'
    chats.write_text(json.dumps({'messages': TURNS[0], 'subject': 'code'}) + '\n')
    assert open_source(str(chats), fields, chat=True)[0] == CHATS[0]._replace(route='code')
    parquet.write_table(pyarrow.Table.from_pylist([{'text': 'x'}]), table)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'subject': its columns are text"):
        open_source(str(table), fields)
    (tmp_path / 'a.txt').write_text('a text')
    with IndexedWriter(tmp_path / 'indexed', vocab_size=300) as writer:
        writer.add([1, 2, 3])
    for name, kind in (('a.txt', '.txt files'), ('indexed', '.idx files')):
        with pytest.raises(ValueError, match=rf"{name}.*route_key='subject' is a field of JSON lines .*{kind} have"):
            open_source(str(tmp_path / name), fields)
    with pytest.raises(ValueError, match=r'stdlib:train: .* this corpus have none'):
        open_source('stdlib:train', fields)
