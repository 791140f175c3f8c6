"""Perplexity against closed forms and against a published model's own numbers."""

import json
import lzma
import math

import jax
import numpy as np
import pytest

from jpt.evaluate import scorer
from jpt.evaluation.perplexity import perplexity
from jpt.evaluation.score import Reference, Scores, score
from jpt.evaluation.windows import batches_of, rows_of
from jpt.model import load
from jpt.models.config import LayerKind, ModelConfig, Rope, runs_of
from jpt.models.transformer import forward, init, unembed


def constant(log_prob):
    """A score that gives every token the same probability."""

    def of(batch):
        ones = np.ones(batch.tokens.shape, np.float32)
        return Scores(log_prob * ones, ones, 0.25 * ones, 0.5 * ones)

    return of


def test_uniform_model_has_the_vocabulary_as_its_perplexity():
    result = perplexity(constant(-math.log(50)), [[1] * 11, [2] * 5], 60, batch_size=2, length=4, has_reference=True)
    assert (result.texts, result.tokens, result.bytes) == (2, 14, 60)
    assert result.perplexity == pytest.approx(50, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(14 * math.log2(50) / 60, rel=1e-6)
    assert (result.kl, result.agreement) == (0.25, 0.5)


def test_without_a_reference_there_is_no_divergence():
    result = perplexity(constant(-1.0), [[1, 2]], 2, batch_size=1, length=4)
    assert math.isnan(result.kl)
    assert math.isnan(result.agreement)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match='two tokens'):
        perplexity(constant(-1.0), [[1], []], 1, batch_size=1, length=4)


def tiny(vocab, width):
    kinds = (LayerKind(Rope(), None, 12),)
    return ModelConfig('llama', vocab, width, 2, 1, 4, runs_of(kinds), 16, tied=True)


def test_scores_equal_the_softmax_of_whole_logits():
    """Chunked scores, and KL and agreement with a reference of another width, against float64 numpy."""
    cfg, other = tiny(23, 8), tiny(23, 12)
    params, reference = init(cfg, jax.random.key(0)), init(other, jax.random.key(1))
    params, reference = jax.tree.map(lambda x: 3 * x, (params, reference))
    texts = [list(np.random.default_rng(0).integers(0, 23, 9)), [3, 4, 5]]
    ((batch, _),) = batches_of(rows_of(texts, 8, 0), 2, 8)
    found = score(cfg, params, batch, reference=Reference(other, reference), chunk=5)

    def log_softmax(cfg, params):
        out = forward(cfg, params, batch.tokens, batch.positions, batch.segment_ids)
        logits = np.asarray(unembed(cfg, params, out.hidden_BTD), np.float64)
        return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))

    log_p, log_q = log_softmax(cfg, params), log_softmax(other, reference)
    seen = batch.segment_ids == 1
    picked = np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.log_prob[seen], picked[seen], atol=1e-5)
    np.testing.assert_allclose(found.kl[seen], np.sum(np.exp(log_q) * (log_q - log_p), -1)[seen], atol=1e-5)
    np.testing.assert_array_equal(found.greedy[seen], (log_p.argmax(-1) == batch.targets)[seen])
    np.testing.assert_array_equal(found.agreement[seen], (log_p.argmax(-1) == log_q.argmax(-1))[seen])


def test_a_reference_of_another_vocabulary_is_refused():
    cfg, other = tiny(23, 8), tiny(24, 8)
    ((batch, _),) = batches_of(rows_of([[1, 2]], 4, 0), 1, 4)
    with pytest.raises(ValueError, match='vocab_size=24'):
        score(cfg, {}, batch, reference=Reference(other, {}))


def test_stories260k_reproduces_its_held_out_loss(shared_data):
    """1.4076 nats per token on 96 held-out stories, as measured by another implementation."""
    folder = shared_data / 'models' / 'stories260K'
    golden = json.loads((folder / 'golden.json').read_text())['heldout_eval']
    first, last = map(int, golden['rows'].split('..'))
    with lzma.open(shared_data / golden['file'], 'rt', encoding='utf8') as file:
        rows = [json.loads(line) for line in file][first:last]
    model = load(folder)
    texts = [next(v for v in row.values() if isinstance(v, str)).replace('\n\n', '\n') for row in rows]
    ids = [model.tokenizer.encode(text, bos=True)[: golden['max_tokens'] + 1] for text in texts]
    result = perplexity(scorer(model), ids, 1, batch_size=16, length=512)
    assert result.tokens == pytest.approx(golden['tokens'], rel=0.01)  # how it cut long stories is not recorded
    assert result.loss == pytest.approx(golden['nll_per_token'], abs=2e-3)
