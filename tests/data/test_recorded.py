"""Recorded targets beside the tokens: any batch, order, packing and number of hosts; what does not fit is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jpt.data.config import DataConfig
from jpt.data.packing import cut
from jpt.data.pipeline import make_pipeline
from jpt.data.recorded import RecordedTargets
from jpt.data.records import Chat, DataError
from jpt.data.sources import MemorySource
from jpt.data.target_codec import PieceTargets, encode_targets
from jpt.data.target_store import Manifest, Piece, hash_of, part_path, write_manifest, write_part
from jpt.data.tokenizer import Tokenizer
from jpt.kernels.sparse_target import SparseTarget

V, J, LENGTH = 4096, 3, 16
RNG = np.random.default_rng(0)
# Indexed tokens: documents of 2 to 60 ids, so of up to four pieces; one twice.
DOCUMENTS = [RNG.integers(5, V, n).astype(np.int32) for n in (2, 60, 17, 18, 33, 9, 16, 5, 40, 12, 7)]
DOCUMENTS.append(DOCUMENTS[2])
PLAIN = DataConfig(least_fill=0.0, prefetch=0)


def said(ids, start, stop):
    """What a teacher that saw `ids` from `start` on would say: a number that shows position, context and tokens."""
    places = np.arange(start, stop)
    words = np.stack([(ids[places] * 3 + j * 7 + start) % V for j in range(J)], axis=-1).astype(np.int32)
    logp = -np.sort((words % 64 + 1) / 16.0, axis=-1).astype(np.float32)
    order = np.argsort(words % 64, axis=-1, kind='stable')
    target = SparseTarget(np.take_along_axis(words, order, -1), logp, (-ids[places] / 512).astype(np.float32))
    return PieceTargets(target, (-ids[places + 1] / 512).astype(np.float32))


def manifest(**changes):
    about = {'path': 'teacher', 'family': 'llama', 'fingerprint': 'f', 'dtype': 'float32'}
    values = Manifest(about, 'tokens', V, 1.0, J, None, 1, 'bfloat16', 2.0**-8, LENGTH, {}, None)
    return dataclasses.replace(values, **changes)


def write(folder, documents=DOCUMENTS, length=LENGTH, per_part=4):
    """Records documents in parts of a few, each cut as the recorder does."""
    folder.mkdir()
    names = []
    for first in range(0, len(documents), per_part):
        own = documents[first : first + per_part]
        pieces = []
        for span in cut([len(ids) - 1 for ids in own], length):
            ids, stop = own[span.document], span.start + span.length
            data = encode_targets(said(ids, span.start, stop), 'bfloat16', V)
            key = hash_of(ids), hash_of(ids[span.start : stop + 1])
            pieces.append(Piece(*key, span.start, span.length, 0, 0, first + span.document, data))
        path = part_path(folder, 'train', len(names))
        write_part(path, pieces, {'next': {}, 'sums': {}})
        names.append({'file': path.name, 'bytes': path.stat().st_size})
    write_manifest(folder, manifest(parts={'train': {'parts': names, 'sums': {}}}, length=length))
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('recorded') / 'targets')


TOKENIZER = Tokenizer.load(Path(__file__).resolve().parents[2] / 'jpt' / 'assets' / 'quickstart_teacher')


def pipeline(targets, documents=DOCUMENTS, *, length=LENGTH, size=4, config=PLAIN, **options):
    source = MemorySource(documents, 'tokens.bin')
    options = {'num_epochs': 1, **options}
    return make_pipeline(
        config, TOKENIZER, batch_size=size, seq_len=length, sources=[source], targets=targets, **options
    )


def assert_said(batch, documents=DOCUMENTS):
    """Every position holds what was said of it with the row's own left context; padding says nothing."""
    ids, logp, log_tail = batch.sparse_target
    assert (ids.shape, logp.shape, log_tail.shape) == ((*batch.tokens.shape, J),) * 2 + (batch.tokens.shape,)
    assert (ids.dtype, str(logp.dtype), log_tail.dtype) == (np.int32, 'bfloat16', np.float32)
    for b, segments in enumerate(batch.segment_ids):
        np.testing.assert_array_equal(ids[b, segments == 0], -1)
        for number in range(1, segments.max(initial=0) + 1):
            at = np.flatnonzero(segments == number)
            own = np.append(batch.tokens[b, at], batch.targets[b, at[-1]])
            whole, start = next(
                (document, start)
                for document in documents
                for start in range(0, len(document), LENGTH)
                if np.array_equal(document[start : start + len(own)], own)
            )
            wanted = said(whole, start, start + len(at)).target
            np.testing.assert_array_equal(ids[b, at], wanted.ids)
            np.testing.assert_array_equal(logp[b, at], wanted.logp.astype(logp.dtype))
            np.testing.assert_array_equal(log_tail[b, at], wanted.log_tail)


@pytest.mark.parametrize(
    ('documents', 'options'),
    [
        (DOCUMENTS, {}),
        (DOCUMENTS, {'size': 2, 'seed': 9, 'num_epochs': 2}),
        (DOCUMENTS[::-2], {'size': 3, 'config': dataclasses.replace(PLAIN, shuffle=False)}),  # another order, fewer
        (DOCUMENTS, {'config': dataclasses.replace(PLAIN, packing='none', prefetch=2)}),
        (DOCUMENTS, {'config': dataclasses.replace(PLAIN, long_documents='truncate', window_rows=2)}),
        (DOCUMENTS, {'evaluate': True}),
    ],
)
def test_every_position_gets_what_was_said_of_it(folder, documents, options):
    feed, count = pipeline(RecordedTargets(folder), documents, **options), 0
    for batch in feed:
        assert_said(batch)
        count += int((batch.segment_ids > 0).sum())
    feed.close()
    short = [min(len(ids) - 1, LENGTH) for ids in documents]
    truncates = options.get('config', PLAIN).long_documents == 'truncate'
    positions = sum(short) if truncates else sum(len(ids) - 1 for ids in documents)
    assert count == positions * options.get('num_epochs', 1)


def test_hosts_have_their_rows_and_a_place_is_gone_back_to(folder):
    targets = RecordedTargets(folder)
    alone = pipeline(targets, seed=3)
    together = [pipeline(targets, seed=3, process_index=p, process_count=2) for p in range(2)]
    first = next(alone)
    state = json.loads(json.dumps(alone.get_state()))
    assert state['data']['targets'] == {'teacher': 'f', 'likely': J, 'dtype': 'bfloat16'}
    for batch in [first, *alone]:
        halves = [next(own) for own in together]
        for name in ('ids', 'logp', 'log_tail'):
            parts = [getattr(half.sparse_target, name) for half in halves]
            np.testing.assert_array_equal(np.concatenate(parts), getattr(batch.sparse_target, name))
    again, last = pipeline(targets, seed=3), batch
    again.set_state(state)
    *_, found = again
    np.testing.assert_array_equal(found.sparse_target.ids, last.sparse_target.ids)
    without = pipeline(None, seed=3)
    with pytest.raises(ValueError, match='saved with targets='):
        without.set_state(state)
    assert next(without).sparse_target is None


def test_pieces_cut_elsewhere(folder, tmp_path):
    """Rows that show less context than the teacher saw are taken where that is asked; those that show more never."""
    target = RecordedTargets(folder)
    ids = DOCUMENTS[1]
    with pytest.raises(
        DataError, match=r'here: positions 4 to 10 .* from 0 on: more than .* least_fill=0 .*length=16'
    ) as e:
        target.of_piece(ids, 4, 6, 'here')
    assert 'config.distill.more_context=True' in str(e.value)
    kinder = RecordedTargets(folder, more_context=True)
    found, whole = kinder.of_piece(ids, 4, 6, ''), said(ids, 0, 16)
    np.testing.assert_array_equal(found.target.ids, whole.target.ids[4:10])
    np.testing.assert_array_equal(found.sampled_logp, whole.sampled_logp[4:10])
    # Positions 16 to 20 were said of a piece that begins at 16; a row that begins at 4 shows more.
    for each in (target, kinder):
        with pytest.raises(DataError, match='more than' if each is target else r'from 16 on: less than .* at least 20'):
            each.of_piece(ids, 4, 16, 'here')
    with pytest.raises(DataError, match=r'tokens.bin\[\d+\]: positions'):
        list(pipeline(target, config=dataclasses.replace(PLAIN, packing='concat')))
    # Whole documents recorded: any cut is covered, with more context.
    longer = RecordedTargets(write(tmp_path / 'whole', length=64), more_context=True)
    for batch in pipeline(longer, config=dataclasses.replace(PLAIN, packing='concat')):
        for b, segments in enumerate(batch.segment_ids):
            got = batch.sparse_target.log_tail[b, segments > 0]
            np.testing.assert_array_equal(got, (-batch.tokens[b, segments > 0] / 512).astype(np.float32))


def test_a_conversation_has_targets_at_every_position_with_loss_or_without(tmp_path):
    turns = [{'role': 'user', 'content': 'What is 1 + 1?'}, {'role': 'assistant', 'content': 'It is 2.'}]
    config = dataclasses.replace(PLAIN, kind='chat')
    plain = pipeline(None, [Chat(turns)], length=64, config=config)
    batch = next(plain)
    own = batch.segment_ids[0] > 0
    ids = np.append(batch.tokens[0, own], batch.targets[0, own][-1])
    targets = RecordedTargets(write(tmp_path / 'chat', [ids], length=64))
    found = next(pipeline(targets, [Chat(turns)], length=64, config=config))
    assert 0 < found.loss_mask.sum() < own.sum()
    np.testing.assert_array_equal(found.sparse_target.ids[0, own], said(ids, 0, own.sum()).target.ids)
    changed = [turns[0], {'role': 'assistant', 'content': 'It is 3.'}]
    with pytest.raises(DataError, match=r'of another text, or was tokenized in another way .*chat template'):
        next(pipeline(targets, [Chat(changed)], length=64, config=config))


def test_documents_that_were_not_recorded(folder, tmp_path):
    other = DOCUMENTS[4].copy()
    other[20] += 1
    with pytest.raises(DataError, match=r'tokens.bin\[0\]: no targets in .* a document of these 33 tokens'):
        list(pipeline(RecordedTargets(folder), [other]))
    cut_short = write(tmp_path / 'short', [DOCUMENTS[1][:30]])
    with pytest.raises(DataError, match='no targets in'):  # another document, though it begins alike
        list(pipeline(RecordedTargets(cut_short), [DOCUMENTS[1]]))


def test_folders_that_are_damaged_or_not_complete(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere: no manifest.json: jpt.distill.record makes it'):
        RecordedTargets(tmp_path / 'nowhere')
    broken = write(tmp_path / 'broken')
    parts = sorted(broken.glob('*.array_record'))
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'train-00001.array_record is damaged'):
        RecordedTargets(broken)
    parts[1].unlink()
    with pytest.raises(ValueError, match=r'train-00001.array_record: this part of the recorded targets is not there'):
        RecordedTargets(broken)
    write_manifest(broken, manifest())
    with pytest.raises(ValueError, match='the recording is not complete'):
        RecordedTargets(broken)
    (broken / 'manifest.json').write_text('{}')
    with pytest.raises(ValueError, match='cannot be read as the manifest'):
        RecordedTargets(broken)


def test_a_piece_of_other_tokens_than_the_index_says(tmp_path):
    """Two documents whose hashes are exchanged: the piece's own hash tells."""
    one, other = DOCUMENTS[5], DOCUMENTS[9]
    folder = tmp_path / 'targets'
    folder.mkdir()
    data = encode_targets(said(one, 0, 8), 'bfloat16', V)
    path = part_path(folder, 'train', 0)
    write_part(path, [Piece(hash_of(other), hash_of(one), 0, 8, 0, 0, 0, data)], {'next': {}, 'sums': {}})
    write_manifest(folder, manifest(parts={'train': {'parts': [{'file': path.name, 'bytes': 0}], 'sums': {}}}))
    with pytest.raises(DataError, match=r'here: .*record 0 is not the piece that the index promises'):
        RecordedTargets(folder).of_piece(other, 0, 8, 'here')
