"""The pipeline: nothing lost, the same under any number of hosts, and resumed bit for bit."""

import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jpt.data.batch import Batch
from jpt.data.indexed import IndexedWriter
from jpt.data.pipeline import DataConfig, make_pipeline
from jpt.data.records import Chat, DataError
from jpt.data.sources import MemorySource, open_source
from jpt.data.tokenizer import Tokenizer

WORDS = ['hi', 'Hello, world!', 'naïve café', 'code', '日本', 'It is 4.', 'a question']
TEXTS = [' '.join(WORDS[(i * k) % 7] for k in range(1, 2 + (i * 5) % 11)) + f' {i}' for i in range(40)]
CHATS = [Chat([{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text[::-1]}]) for text in TEXTS[:20]]
SMALL = {'window_rows': 3, 'prefetch': 0}


def make(tokenizer, records=TEXTS, *, batch_size=4, seq_len=48, config=None, **arguments):
    sources = [MemorySource(records)] if isinstance(records[0], str | Chat) else records
    settings = SMALL | ({'kind': 'chat'} if isinstance(records[0], Chat) else {})
    return make_pipeline(
        DataConfig(**settings | (config or {})),
        tokenizer,
        batch_size=batch_size,
        seq_len=seq_len,
        sources=sources,
        **arguments,
    )


def segments(batches):
    """Every segment of every row: (tokens and the last target, loss weights)."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            ids = batch.segment_ids[row]
            assert ids.tolist() == sorted(ids.tolist(), key=lambda s: s or 10**9)  # in order, padding at the end
            for s in range(1, ids.max(initial=0) + 1):
                where = np.flatnonzero(ids == s)
                assert where.tolist() == list(range(where[0], where[-1] + 1))
                assert batch.positions[row, where].tolist() == list(range(len(where)))
                tokens, targets = batch.tokens[row, where], batch.targets[row, where]
                assert tokens[1:].tolist() == targets[:-1].tolist()
                found.append(([*tokens.tolist(), int(targets[-1])], batch.loss_mask[row, where].tolist()))
    return found


def equal(one: Batch, two: Batch) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one[:5], two[:5], strict=True))


@pytest.mark.parametrize('packing', ['best_fit', 'concat', 'none'])
@pytest.mark.parametrize('seq_len', [8, 48, 200])
def test_every_target_is_learned_once(tokenizer, packing, seq_len):
    batches = list(make(tokenizer, seq_len=seq_len, num_epochs=1, config={'packing': packing}))
    expected = [tokenizer.encode(text, eos=True) for text in TEXTS]
    # The pieces of a document overlap by the token at which it is cut, so pairs (token, target) are what is counted.
    pairs = [pair for ids, _ in segments(batches) for pair in itertools.pairwise(ids)]
    assert sorted(pairs) == sorted(pair for ids in expected for pair in itertools.pairwise(ids))
    assert all(set(loss) == {1.0} for _, loss in segments(batches))
    if seq_len == 200 and packing != 'concat':
        assert sorted(ids for ids, _ in segments(batches)) == sorted(expected)


def test_padding_is_inert_and_the_last_batch_is_filled(tokenizer):
    batches = list(make(tokenizer, batch_size=7, num_epochs=1))
    for batch in batches:
        assert [a.shape for a in batch[:5]] == [(7, 48)] * 5
        padding = batch.segment_ids == 0
        assert not batch.loss_mask[padding].any()
        assert not batch.positions[padding].any()
        assert set(batch.tokens[padding].tolist()) | set(batch.targets[padding].tolist()) <= {tokenizer.pad_id}
    rows = [row.any() for batch in batches for row in batch.segment_ids]
    assert rows == sorted(rows, reverse=True)  # empty rows at the very end only
    assert len(rows) - sum(rows) < 7


def test_bos_and_eos_as_the_config_says(tokenizer):
    def ends(**config):
        found = segments(make(tokenizer, ['hi'], num_epochs=1, config=config))
        return [ids for ids, _ in found]

    plain = tokenizer.encode('hi')
    assert ends() == [[*plain, 0]]
    assert ends(add_bos=True) == [[3, *plain, 0]]
    assert ends(add_bos=True, add_eos=False) == [[3, *plain]]


@pytest.mark.parametrize('hosts', [2, 4])
@pytest.mark.parametrize('records', [TEXTS, CHATS], ids=['text', 'chat'])
def test_hosts_share_the_same_global_batches(tokenizer, hosts, records):
    alone = make(tokenizer, records, seq_len=200, seed=5, num_epochs=2)
    together = [
        make(tokenizer, records, seq_len=200, seed=5, num_epochs=2, process_index=p, process_count=hosts)
        for p in range(hosts)
    ]
    count = 0
    for batch in alone:
        parts = [next(pipeline) for pipeline in together]
        assert equal(batch, jax.tree.map(lambda *rows: np.concatenate(rows), *parts))
        states = [json.dumps(pipeline.get_state()) for pipeline in together]
        assert set(states) == {json.dumps(alone.get_state())}
        assert together[0].progress() == alone.progress()
        count += 1
    assert count >= 4
    assert all(next(pipeline, None) is None for pipeline in together)


@pytest.mark.parametrize('config', [{}, {'packing': 'concat'}, {'prefetch': 2}], ids=['plain', 'concat', 'prefetch'])
def test_resuming_anywhere_gives_the_same_batches(tokenizer, config):
    def fresh():
        return make(tokenizer, seed=1, num_epochs=3, config=config)

    whole = fresh()
    states, batches = [json.dumps(whole.get_state())], []
    for batch in whole:
        batches.append(batch)
        states.append(json.dumps(whole.get_state()))
    assert len(batches) > 10
    resumed = fresh()
    for step in [*range(len(states)), 3, 0]:  # forwards, and back again
        resumed.set_state(json.loads(states[step]))
        assert json.dumps(resumed.get_state()) == states[step]
        for expected in batches[step : step + 3]:
            assert equal(next(resumed), expected)
    assert json.dumps(resumed.get_state()) == states[3]
    resumed.set_state(json.loads(states[-1]))
    assert next(resumed, None) is None
    resumed.close()
    whole.close()


def test_resuming_on_another_number_of_hosts(tokenizer):
    one = make(tokenizer)
    for _ in range(5):
        next(one)
    two = [make(tokenizer, process_index=p, process_count=2) for p in (0, 1)]
    for pipeline in two:
        pipeline.set_state(one.get_state())
    for _ in range(5):
        assert np.array_equal(next(one).tokens, np.concatenate([next(p).tokens for p in two]))


def test_prefetching_changes_nothing(tokenizer):
    plain, ahead = (make(tokenizer, num_epochs=2, config={'prefetch': n}) for n in (0, 3))
    for a, b in itertools.zip_longest(plain, ahead):
        assert equal(a, b)
        assert plain.get_state() == ahead.get_state()
    ahead.close()


@pytest.mark.parametrize('prefetch', [0, 2])
def test_closing_ends_it(tokenizer, prefetch):
    pipeline = make(tokenizer, config={'prefetch': prefetch})
    next(pipeline)
    pipeline.close()
    pipeline.close()  # again does nothing
    with pytest.raises(ValueError, match='this Pipeline is closed'):
        next(pipeline)


def test_a_program_may_end_without_closing(tokenizer_folder):
    code = (
        'from jpt.data.pipeline import *; from jpt.data.tokenizer import Tokenizer\n'
        'from jpt.data.sources import MemorySource\n'
        f'tokenizer = Tokenizer.load({str(tokenizer_folder)!r})\n'
        "sources = [MemorySource(['a few words'] * 100)]\n"
        'pipeline = make_pipeline(DataConfig(), tokenizer, batch_size=2, seq_len=8, sources=sources)\n'
        'print(next(pipeline).tokens.shape)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ('(2, 8)\n', '')


def test_orbax_saves_and_restores_the_iterator(tokenizer, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    pipeline = make(tokenizer, config={'prefetch': 1})
    for _ in range(4):
        next(pipeline)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(pipeline.iterator)))
        manager.wait_until_finished()
        expected = [next(pipeline) for _ in range(3)]
        other = make(tokenizer, config={'prefetch': 1})
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other.iterator)))
    assert all(equal(next(other), batch) for batch in expected)
    pipeline.close()
    other.close()


def test_a_state_of_other_data_is_refused(tokenizer):
    state = json.loads(json.dumps(make(tokenizer).get_state()))
    make(tokenizer, batch_size=8).set_state(state)  # the batch size may change
    for arguments, name in [
        ({'seq_len': 24}, 'seq_len=48'),
        ({'seed': 7}, 'seed=0'),
        ({'records': TEXTS[:-1]}, 'sources='),
        ({'config': {'packing': 'none'}}, "packing='best_fit', but this run has packing='none'"),
        ({'evaluate': True}, 'shuffle=True'),
    ]:
        with pytest.raises(ValueError, match=f'the data state was saved with {name}'):
            make(tokenizer, **arguments).set_state(state)


def test_epochs_are_shuffled_anew(tokenizer):
    per_epoch = len(list(make(tokenizer, batch_size=1, num_epochs=1)))
    rows = [json.dumps(batch.tokens.tolist()) for batch in make(tokenizer, batch_size=1, num_epochs=2)]
    first, second = rows[:per_epoch], rows[per_epoch:]
    assert first != second
    other = [json.dumps(batch.tokens.tolist()) for batch in make(tokenizer, batch_size=1, num_epochs=1, seed=1)]
    assert other != first
    unshuffled = make(tokenizer, num_epochs=2, batch_size=1, config={'shuffle': False, 'packing': 'none'})
    firsts = [ids for ids, _ in segments(unshuffled)]
    assert firsts[: len(firsts) // 2] == firsts[len(firsts) // 2 :]


def test_evaluation_is_one_pass_in_order_on_every_host(tokenizer):
    config = {'packing': 'none', 'window_rows': 4}
    found = [ids for ids, _ in segments(make(tokenizer, seq_len=200, evaluate=True, config=config))]
    assert found == [tokenizer.encode(text, eos=True) for text in TEXTS]
    hosts = [
        list(make(tokenizer, TEXTS[:5], seq_len=200, evaluate=True, process_index=p, process_count=4)) for p in range(4)
    ]
    assert len({len(batches) for batches in hosts}) == 1  # also where a host has empty rows only
    assert sum(len(segments(batches)) for batches in hosts) == 5


def test_weights_are_left_out_of_evaluation(tokenizer):
    sources = [MemorySource(TEXTS[:4]), MemorySource(TEXTS[4:])]
    found = make(tokenizer, sources, seq_len=200, evaluate=True, config={'weights': (0.9, 0.1)})
    assert len(segments(found)) == len(TEXTS)


def test_blends_follow_their_weights_and_resume(tokenizer):
    sources = [MemorySource(['hi'] * 3), MemorySource(['code'] * 50)]
    config = {'weights': (3.0, 1.0), 'packing': 'none', 'shuffle': False}
    pipeline = make(tokenizer, sources, batch_size=8, config=config)
    batches = [next(pipeline) for _ in range(5)]
    state = pipeline.get_state()
    after = [next(pipeline) for _ in range(3)]
    hi = tokenizer.encode('hi', eos=True)
    assert sum(ids == hi for ids, _ in segments(batches)) == 30  # of 40
    other = make(tokenizer, sources, batch_size=8, config=config)
    other.set_state(state)
    assert all(equal(next(other), batch) for batch in after)
    with pytest.raises(ValueError, match='expected one for each of 2 sources'):
        make(tokenizer, sources, config={'weights': (1.0,)})


def test_loss_is_on_answers_only_and_eos_stays_where_pad_is_eos(tmp_path, write_tokenizer, tokenizer):
    config = {'eos_token': '<|end|>', 'pad_token': '<|end|>', 'chat_template': tokenizer.config['chat_template']}
    same = Tokenizer.load(write_tokenizer(tmp_path, config))
    found = segments(make(same, CHATS, seq_len=200, num_epochs=1))
    assert len(found) == len(CHATS)
    answers = [[i for i, w in zip(ids[1:], loss, strict=True) if w] for ids, loss in found]
    expected = [same.encode(chat.messages[1]['content'] + '<|end|>') for chat in CHATS]
    assert sorted(answers) == sorted(expected)
    assert all(answer[-1] == same.pad_id == same.eos_id for answer in answers)


LONG = Chat([{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'code ' * 30}])
ASKS = Chat([{'role': 'user', 'content': 'code ' * 30}, {'role': 'assistant', 'content': 'hi'}])
SHORT = Chat([{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'Hello'}])


@pytest.mark.parametrize(
    ('policy', 'counted', 'documents'),
    [('truncate', {'truncated': 1, 'dropped': 1}, 2), ('drop', {'dropped': 2}, 1), ('split', {'split': 2}, 3)],
)
def test_conversations_longer_than_a_row(tokenizer, policy, counted, documents):
    pipeline = make(tokenizer, [LONG, SHORT, ASKS], num_epochs=1, config={'long_documents': policy})
    found = segments(pipeline)
    progress = pipeline.progress()
    assert {name: progress[name] for name in ('truncated', 'dropped', 'split') if progress[name]} == counted
    assert progress['documents'] == documents  # a question that fills the row has no answer left: dropped
    if policy == 'truncate':
        ids = tokenizer.encode(f'<|turn|>user\nhi<|end|>\n<|turn|>assistant\n{"code " * 30}')
        assert sorted(len(f[0]) for f in found)[-1] == 49
        assert ids[:49] in [f[0] for f in found]
    if policy == 'split':
        assert sum(len(ids) - 1 for ids, _ in found) == progress['tokens']


def test_a_long_conversation_is_an_error_unless_told(tokenizer):
    with pytest.raises(DataError, match=r'memory\[1\]: \d+ tokens do not fit a row of seq_len=48'):
        list(make(tokenizer, [SHORT, LONG], num_epochs=1))


def test_malformed_lines_stop_or_are_counted(tokenizer, tmp_path):
    rows = [json.dumps({'text': text}) for text in TEXTS]
    rows[3:3] = ['{"text": ', '{"no": "text"}', '{"text": ""}']
    (tmp_path / 'a.jsonl').write_text('\n'.join(rows))
    source = open_source(str(tmp_path / 'a.jsonl'))
    with pytest.raises(DataError, match=r'a\.jsonl:4: not JSON'):
        list(make(tokenizer, [source], evaluate=True))
    pipeline = make(tokenizer, [source], num_epochs=2, config={'malformed': 'skip', 'prefetch': 2})
    found = segments(pipeline)
    progress = pipeline.progress()
    assert (progress['skipped'], progress['empty'], progress['documents']) == (4, 2, 80)
    assert len(found) >= 80
    pipeline.close()


def test_a_template_that_refuses_a_conversation_names_the_line(tmp_path, write_tokenizer):
    config = {'eos_token': '<|end|>', 'chat_template': "{{ raise_exception('no ' + messages[0].role) }}"}
    strict = Tokenizer.load(write_tokenizer(tmp_path, config))
    with pytest.raises(DataError, match=r'memory\[\d+\]: chat template of .*: no user'):
        next(make(strict, CHATS))
    with pytest.raises(DataError, match=r'a whole epoch gave no row: 20 skipped'):
        next(make(strict, CHATS, config={'malformed': 'skip'}))


def test_indexed_tokens_are_taken_as_they_are(tokenizer, tmp_path):
    with IndexedWriter(tmp_path / 'x', vocab_size=400) as writer:
        for text in TEXTS:
            writer.add(tokenizer.encode(text, eos=True))
    source = open_source(str(tmp_path / 'x'))
    found = segments(make(tokenizer, [source], seq_len=200, evaluate=True, config={'packing': 'none'}))
    assert [ids for ids, _ in found] == [tokenizer.encode(text, eos=True) for text in TEXTS]
    with IndexedWriter(tmp_path / 'x', vocab_size=400) as writer:
        writer.add([5, 6])
        writer.add([7, 399, 8])
    wrong = make(tokenizer, [open_source(str(tmp_path / 'x'))], evaluate=True)
    with pytest.raises(DataError, match=r'x\.bin: document 1: token id 399, but the vocabulary .* has 300'):
        next(wrong)


def test_progress_counts_what_was_given(tokenizer):
    pipeline = make(tokenizer, num_epochs=1)
    assert pipeline.progress()['fill'] == 1.0
    tokens = rows = 0
    for batch in pipeline:
        tokens += int((batch.segment_ids > 0).sum())
        rows += int(batch.segment_ids.any(axis=1).sum())
        progress = pipeline.progress()
        assert (progress['tokens'], progress['rows']) == (tokens, rows)
        assert progress['fill'] == pytest.approx(tokens / (rows * 48))
    assert progress['epoch'] == 1
    assert progress['documents'] == len(TEXTS)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'batch_size': 0}, 'batch_size=0: expected at least 1'),
        ({'seq_len': 0}, 'seq_len=0: expected at least 1'),
        ({'process_count': 3}, 'batch_size=4 does not divide by process_count=3'),
        ({'process_index': 2, 'process_count': 2}, r'process_index=2: expected 0\.\.1'),
        ({'num_epochs': 0}, 'num_epochs=0: expected at least 1, or None'),
        ({'config': {'paths': ('a',)}}, r"DataConfig\.paths=\('a',\) too"),
        ({'records': [MemorySource([])]}, 'memory has no records'),
    ],
    ids=range(7),
)
def test_arguments_that_cannot_be(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **arguments)


def test_no_paths_and_no_sources(tokenizer):
    with pytest.raises(ValueError, match=r'DataConfig\.paths is empty'):
        make_pipeline(DataConfig(), tokenizer, batch_size=1, seq_len=8)


@pytest.mark.parametrize('seq_len', [512, 1024, 2048])
def test_real_lengths_fill_the_rows(shared_data, seq_len):
    tokenizer = Tokenizer.load(shared_data / 'tokenizers' / 'jpt-bpe-8k')
    stories = DataConfig(paths=(str(shared_data / 'text' / 'tinystories_1k.jsonl.xz'),))
    pipeline = make_pipeline(stories, tokenizer, batch_size=8, seq_len=seq_len, num_epochs=1)
    assert sum(int((batch.segment_ids > 0).sum()) for batch in pipeline) == pipeline.progress()['tokens']
    assert pipeline.progress()['fill'] > 0.99
    assert pipeline.progress()['documents'] == 1097
    assert pipeline.progress()['split'] < 0.1 * 1097
    pipeline.close()


def test_a_line_for_people(tokenizer):
    pipeline = make(tokenizer, ['', 'hi'], batch_size=1, seq_len=4, num_epochs=1)
    assert len(list(pipeline)) == 1
    positions = len(tokenizer.encode('hi'))  # each of them has a target, the last one eos
    line = f'1 documents in 1 rows, {positions / 4:.1%} full, 1 empty; passes finished: 1'
    assert pipeline.describe() == line


def test_texts_that_fit_are_cut_only_where_rows_would_stay_empty(tokenizer):
    ids = [np.full(31, 5, np.int32)] * 40  # 30 positions each: two do not fit into a row of 48

    def rows(**config):
        config['window_rows'] = 512
        pipeline = make(tokenizer, [MemorySource(ids)], batch_size=1, num_epochs=1, config=config)
        return len(list(pipeline)), pipeline.progress()['split']

    assert rows(least_fill=0.0) == (40, 0)
    assert rows(long_documents='truncate') == (40, 0)
    count, split = rows()
    assert count == 25  # 1,200 positions, without a gap
    assert 0 < split < 25
