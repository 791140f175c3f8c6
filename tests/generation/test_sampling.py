"""Cuts, penalty and draws against float64 numpy written with sorts, and against the distribution they promise."""

import jax
import numpy as np
import pytest

from jpt.generation.sampling import SamplingConfig, draw, first_argmax, penalize, process, stack

V = 37
process_jit = jax.jit(process)
draw_jit = jax.jit(draw, static_argnames='with_logps')


def softmax(scores):
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()


def kept_by_sorting(logits, config):
    """Which tokens may be drawn, by one float64 sort per cut; logits without ties."""
    scores = np.float64(logits) / (config.temperature or 1)
    if config.top_k:
        scores[scores < np.sort(scores)[::-1][: config.top_k][-1]] = -np.inf
    if config.top_p < 1:
        order = np.argsort(-scores)
        before = np.cumsum(softmax(scores)[order]) - softmax(scores)[order]
        scores[order[before >= config.top_p]] = -np.inf
    if config.min_p:
        probs = softmax(scores)
        scores[probs < config.min_p * probs.max()] = -np.inf
    return scores


CONFIGS = [
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.0, top_k=5),
    SamplingConfig(temperature=1.3, top_p=0.8),
    SamplingConfig(temperature=2.0, min_p=0.2),
    SamplingConfig(temperature=0.5, top_k=9, top_p=0.6, min_p=0.05),
    SamplingConfig(temperature=1.0, top_k=1000, top_p=1e-6),
    SamplingConfig(temperature=0.0, top_k=3),
]


@pytest.mark.parametrize('seed', range(4))
def test_every_row_is_cut_by_its_own_settings(seed):
    logits = np.random.default_rng(seed).normal(0, 3, (len(CONFIGS), V)).astype(np.float32)
    scores = np.asarray(process_jit(logits, stack(CONFIGS)))
    for row, config in enumerate(CONFIGS):
        wanted = kept_by_sorting(logits[row], config)
        np.testing.assert_array_equal(np.isfinite(scores[row]), np.isfinite(wanted), err_msg=str(config))
        np.testing.assert_allclose(scores[row], wanted, rtol=1e-6)


def test_equal_scores_are_kept_or_cut_together():
    logits = np.full((len(CONFIGS), V), -8.0, np.float32)
    logits[:, [3, 7, 11]] = 2.0
    logits[:, 20] = 3.0
    two, half = SamplingConfig(temperature=1.0, top_k=2), SamplingConfig(temperature=1.0, top_p=0.6)
    scores = process_jit(logits, stack([two, half, *CONFIGS[2:]]))
    # Token 20 has e / (e + 3) = 0.475 of the mass: less than 0.6, so a nucleus needs the next ones too.
    for row in (0, 1):
        assert np.flatnonzero(np.isfinite(scores[row])).tolist() == [3, 7, 11, 20]


def test_the_nucleus_ends_where_it_reaches_its_mass():
    # Probabilities 1/2, 1/4, ... (and one rest), exact in binary: a nucleus of 3/4 is two tokens, a hair more is three.
    probs = np.append(0.5 ** np.arange(1, V), 0.5 ** (V - 1))
    logits = np.tile(np.log(probs), (len(CONFIGS), 1)).astype(np.float32)
    masses = [0.5, 0.500001, 0.75, 0.750001, 0.875, 0.99, 0.000001]
    settings = stack([SamplingConfig(temperature=1.0, top_p=mass) for mass in masses])
    counts = np.isfinite(process_jit(logits, settings)).sum(axis=1)
    # float32 softmax may miss exact sums by an ulp at 0.875, so that one is asked for in the interior of its step.
    assert counts[[0, 1, 2, 3, 5, 6]].tolist() == [1, 2, 2, 3, 7, 1]


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = np.float32([[2.0, -2.0, 4.0, 0.0], [2.0, -2.0, 4.0, -np.inf]])
    seen = np.array([[True, True, False, True], [False, True, True, True]])
    got = jax.jit(penalize)(logits, seen, np.float32([2.0, 0.5]))
    np.testing.assert_array_equal(got, [[1.0, -4.0, 4.0, 0.0], [2.0, -1.0, 8.0, -np.inf]])


def test_draws_follow_the_distribution():
    """Pearson's chi-square of 20,000 draws, each row its own seed, over the eight most probable tokens."""
    rows = 20_000
    logits = np.random.default_rng(1).normal(0, 1, V).astype(np.float32)
    config = SamplingConfig(temperature=0.8, top_k=8)
    settings = jax.tree.map(lambda leaf: np.repeat(leaf, rows), stack([config]))
    settings = settings._replace(seed=np.arange(rows, dtype=np.uint32))
    tokens, _ = draw_jit(np.tile(logits, (rows, 1)), None, settings, np.full(rows, 5, np.int32), with_logps=False)
    probs = softmax(kept_by_sorting(logits, config))
    counts = np.bincount(tokens, minlength=V)
    assert counts[probs == 0].sum() == 0
    expected = rows * probs[probs > 0]
    statistic = np.sum((counts[probs > 0] - expected) ** 2 / expected)
    assert statistic < 24.32, 'the 99.9 % point of chi-square with 7 degrees of freedom'


def test_a_row_draws_alone_what_it_draws_in_a_batch():
    random = np.random.default_rng(2)
    logits = random.normal(0, 1, (5, V)).astype(np.float32)
    seen = random.random((5, V)) < 0.3
    seeds = [7, 7, 3, 0, 2**32 - 1]
    mix = [SamplingConfig(temperature=2.0, seed=seeds[0], repetition_penalty=1.5), SamplingConfig(seed=seeds[1])]
    mix += [SamplingConfig(temperature=1.0 + i, top_k=20 * i, top_p=0.9, seed=seeds[i]) for i in (2, 3, 4)]
    steps = np.arange(5, dtype=np.int32)
    tokens, logps = draw_jit(logits, seen, stack(mix), steps)
    for i in range(5):
        alone, alone_logps = draw_jit(logits[i : i + 1], seen[i : i + 1], stack([mix[i]]), steps[i : i + 1])
        assert alone[0] == tokens[i]
        np.testing.assert_allclose(alone_logps.sampled[0], logps.sampled[i], rtol=1e-6)


def test_seed_and_step_each_change_the_draw():
    flat = np.zeros((64, V), np.float32)
    config = SamplingConfig(temperature=1.0)

    def tokens(seeds, steps):
        settings = stack([config] * 64)._replace(seed=np.uint32(seeds))
        return np.asarray(draw_jit(flat, None, settings, np.int32(steps), with_logps=False)[0])

    base = tokens(np.arange(64), np.zeros(64, int))
    assert np.array_equal(base, tokens(np.arange(64), np.zeros(64, int)))
    # Among 37 equally probable tokens independent draws agree in 1 of 37 rows: 12 of 64 has probability 1e-7.
    assert np.sum(base == tokens(np.arange(64), np.ones(64, int))) < 12
    assert np.sum(base == tokens(np.arange(64) + 64, np.zeros(64, int))) < 12


def test_log_probabilities_are_those_of_the_model_and_of_the_draw():
    random = np.random.default_rng(4)
    logits = random.normal(0, 2, (5, V)).astype(np.float32)
    seen = random.random((5, V)) < 0.5
    configs = [SamplingConfig(temperature=t, top_k=k, seed=9, repetition_penalty=1.7) for t, k in ((0.5, 0), (2.0, 6))]
    configs += [SamplingConfig(repetition_penalty=1.7)] * 3
    tokens, logps = draw_jit(logits, seen, stack(configs), np.zeros(5, np.int32))
    for row, config in enumerate(configs):
        token = int(tokens[row])
        assert logps.model[row] == pytest.approx(np.log(softmax(np.float64(logits[row])))[token], abs=1e-5)
        wide = np.float64(logits[row])
        wide[seen[row]] = np.where(wide > 0, wide / 1.7, wide * 1.7)[seen[row]]
        if config.temperature:
            probs = softmax(kept_by_sorting(wide, config))
            assert logps.sampled[row] == pytest.approx(np.log(probs[token]), abs=1e-5)
        else:
            assert token == wide.argmax()
            assert logps.sampled[row] == 0


@pytest.mark.parametrize('size', [1, 63, 4096])
def test_argmax_is_the_first_of_the_largest(size):
    scores = np.random.default_rng(size).integers(0, 9, (3, size)).astype(np.float32)
    scores[2] = -np.inf
    np.testing.assert_array_equal(jax.jit(first_argmax)(scores), scores.argmax(axis=1))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', float('nan')),
        ('top_k', -1),
        ('top_k', 2.5),
        ('top_p', 0.0),
        ('top_p', 1.1),
        ('min_p', 1.5),
        ('repetition_penalty', 0.0),
        ('seed', -1),
        ('seed', 2**32),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf'^{name}={value!r}: expected'.replace('.', r'\.')):
        SamplingConfig(**{name: value})
