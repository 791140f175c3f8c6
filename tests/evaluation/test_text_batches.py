"""Rows of data pipelines to calibrate with and to measure on: as many as are asked for, of texts and conversations."""

import dataclasses
import json

import numpy as np
import pytest

import jpt
from jpt.data.config import DataConfig, TextConfig
from jpt.evaluation.text import batches_from
from jpt.model import Model


@pytest.fixture(scope='module')
def model():
    return jpt.load('quickstart')


@pytest.fixture
def files(tmp_path):
    """Texts of one word again and again, of which every file has its own, and a conversation."""
    for word in ('cat', 'dog'):
        texts = (json.dumps({'text': f' {word}' * (21 + n)}) for n in range(30))
        (tmp_path / f'{word}.jsonl').write_text('\n'.join(texts))
    talk = [{'role': 'user', 'content': 'Add 2 and 1.'}, {'role': 'assistant', 'content': 'It is 3.'}]
    (tmp_path / 'chat.jsonl').write_text('\n'.join(json.dumps({'messages': talk}) for _ in range(9)))
    return tmp_path


def real_rows(batches):
    """Rows with any token, over all batches."""
    return sum(int((batch.segment_ids > 0).any(axis=1).sum()) for batch in batches)


def decoded(model, batches):
    return [model.tokenizer.decode(row[seg > 0].tolist()) for b in batches for row, seg in zip(b[0], b[4], strict=True)]


def test_as_many_rows_as_are_asked_for(model, files):
    """Also where they are no whole batches; fewer where there are no more."""
    paths = str(files / 'cat.jsonl'), str(files / 'dog.jsonl')
    text = TextConfig.of_files(*paths, rows=7, length=16, batch_size=3)
    calibration, held_out = batches_from(model, text)
    for batches, word in ((calibration, 'cat'), (held_out, 'dog')):
        assert [batch.tokens.shape for batch in batches] == [(3, 16)] * 3
        assert real_rows(batches) == 7
        assert batches[-1].loss_mask[1:].sum() == 0
        words = ' '.join(decoded(model, batches)).replace('<|endoftext|>', ' ').split()
        assert set(words) <= {word, word[1:], word[2:]}
    few = batches_from(model, dataclasses.replace(text, rows=10_000, batch_size=8))[0]
    texts = model.tokenizer.encode_batch([' cat' * (21 + n) for n in range(30)], eos=True, bos=model.tokenizer.adds_bos)
    # Each token but the first of a text is predicted once.
    assert sum(int(batch.loss_mask.sum()) for batch in few) == sum(len(ids) - 1 for ids in texts)
    same, other = (batches_from(model, dataclasses.replace(text, seed=seed))[0] for seed in (0, 1))
    np.testing.assert_array_equal(same[0].tokens, calibration[0].tokens)
    assert any((one.tokens != two.tokens).any() for one, two in zip(same, other, strict=True))


def test_conversations_and_blends(model, files):
    """What the assistant says is what is measured; of files with weights each gives its share."""
    chat = DataConfig((str(files / 'chat.jsonl'),), kind='chat')
    calibration, held_out = batches_from(model, TextConfig(chat, chat, rows=4, length=64, batch_size=4))
    assert held_out is calibration
    for batch in calibration:
        said = model.tokenizer.decode(batch.targets[0][(batch.loss_mask[0] > 0) & (batch.segment_ids[0] == 1)].tolist())
        assert 'It is 3.' in said
        assert 'Add' not in said
    paths = str(files / 'cat.jsonl'), str(files / 'dog.jsonl')
    blend = DataConfig(paths, weights=(3.0, 1.0))
    text = ' '.join(decoded(model, batches_from(model, TextConfig(blend, chat, rows=50, length=64))[0]))
    assert 2 < text.count('cat') / text.count('dog') < 4.5


def test_what_cannot_be_read(model, files):
    (files / 'short.jsonl').write_text('{"text": ""}\n{"text": ""}\n')
    short = TextConfig(DataConfig((str(files / 'short.jsonl'),), add_eos=False))
    with pytest.raises(ValueError, match='a whole epoch gave no row: 2 empty'):
        batches_from(model, short)
    with pytest.raises(ValueError, match='no tokenizer'):
        batches_from(Model(model.config, model.params), TextConfig())
    with pytest.raises(ValueError, match='no route_key'):
        TextConfig(DataConfig(('a.jsonl',), route_key='teacher'))
    for name, least in (('rows', 1), ('batch_size', 1), ('length', 0), ('seed', 0)):
        with pytest.raises(ValueError, match=rf'TextConfig\.{name}={least - 1}: expected {least} or more'):
            TextConfig(**{name: least - 1})
