"""Scores of a model's parts, from sums that are written by hand, and which parts the highest scores keep."""

import dataclasses

import numpy as np

from jpt.models.calibration import Calibration
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.pruning.importance import importance, most, most_heads, of_layers

WIDE = LayerKind(Rope(), mlp_width=3)
CFG = ModelConfig(
    family='llama',
    vocab_size=7,
    width=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    segments=(Segment((WIDE, dataclasses.replace(WIDE, window=4)), 2), Segment((WIDE,), 1)),
    max_length=8,
)


def sums(repeats: int, first: float) -> dict:
    """Of a layer kind: every number says which repeat, channel and statistic it is of."""

    def of(size: int, step: float) -> dict:
        base = first + np.arange(repeats)[:, None] * 100 + np.arange(size)[None] * step
        return {'input': {'absolute': base, 'square': base**2}}

    attn = {'q': of(2, 1), 'k': of(2, 1), 'v': of(2, 1), 'out': of(4, 5)}
    return {
        'attn': attn,
        'mlp': {'up': of(2, 3), 'gate': of(2, 3), 'down': of(3, 7)},
        'cosine': first + np.arange(repeats),
        'entering': first + np.arange(repeats)[:, None] * 100 + np.arange(2)[None] * 11,
    }


CALIBRATION = Calibration(4.0, [[sums(2, 1000.0), sums(2, 2000.0)], [sums(1, 3000.0)]], np.array([8.0, 12.0]))
FIRST = [1000.0, 2000.0, 1100.0, 2100.0, 3000.0]  # of each layer, in the order of the model


def test_scores_are_means_over_tokens_layer_by_layer():
    scores = importance(CFG, CALIBRATION)
    np.testing.assert_allclose(scores.layers_L, 1 - np.array([1000, 2000, 1001, 2001, 3000]) / 4)
    np.testing.assert_allclose(scores.mlp_LF, [[(x + 7 * c) / 4 for c in range(3)] for x in FIRST])
    heads = [[np.hypot(x + 10 * n, x + 10 * n + 5) / 2 for n in range(2)] for x in FIRST]  # sqrt of a sum over 4
    np.testing.assert_allclose(scores.heads_LN, heads)
    np.testing.assert_allclose(scores.streams_LD, [*([x / 4, (x + 11) / 4] for x in FIRST), [2, 3]])
    np.testing.assert_allclose(scores.width_LD, [[(2 * x + 4 * d) / 4 for d in range(2)] for x in FIRST])


def test_some_layers():
    scores, some = importance(CFG, CALIBRATION), of_layers(importance(CFG, CALIBRATION), (0, 3))
    for name in ('layers_L', 'mlp_LF', 'heads_LN', 'width_LD'):
        np.testing.assert_array_equal(getattr(some, name), getattr(scores, name)[[0, 3]])
    np.testing.assert_array_equal(some.streams_LD, scores.streams_LD[[0, 3, 5]])


def test_a_model_that_cannot_be_narrowed_has_scores_of_layers_only():
    cfg = dataclasses.replace(CFG, sinks=True)
    assert importance(cfg, CALIBRATION).mlp_LF is None
    assert of_layers(importance(cfg, CALIBRATION), (1,)).layers_L.tolist() == [1 - 500]


def test_the_most_are_ascending_and_the_first_of_equals():
    assert most(np.array([1.0, 5, 3, 5, 2]), 2) == (1, 3)
    assert most(np.array([1.0, 5, 3, 5, 5]), 2) == (1, 3)
    assert most(np.array([1.0, 5, 3]), 3) == (0, 1, 2)


def test_heads_go_by_groups_and_within_groups():
    scores = np.array([9.0, 0, 0, 5, 6, 6, 1, 2, 3])  # three groups of three: roots of 81, 97, 14
    assert most_heads(scores, 3, 6, 2) == ((0, 1, 2, 3, 4, 5), (0, 1))
    assert most_heads(scores, 3, 3, 1) == ((3, 4, 5), (1,))
    assert most_heads(scores, 3, 3, 3) == ((0, 4, 8), (0, 1, 2))
    assert most_heads(scores, 3, 4, 2) == ((0, 1, 4, 5), (0, 1))
