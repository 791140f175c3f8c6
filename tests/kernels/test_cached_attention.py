"""Attention over a cache against a float64 softmax written out head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.kernels.blockwise_attention import Scores
from jpt.kernels.cached_attention import cached_attention
from jpt.kernels.masks import Mask, Places

B, N, K, H, S = 3, 6, 3, 8, 12


def reference(q, k, v, places, rule):
    """One query, one head at a time, in float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = (places.q_segments[b, t] == places.k_segments[b]) & (places.k_segments[b] != 0)
            distance = places.q_positions[b, t] - places.k_positions[b]
            seen &= (distance >= 0) & (distance < (rule.mask.window or S))
            if not seen.any():
                continue
            for n in range(N):
                kv = n // (N // K)
                scores = rule.scale * (k[b, seen, kv] @ q[b, t, n])
                if rule.soft_cap:
                    scores = rule.soft_cap * np.tanh(scores / rule.soft_cap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, seen, kv] / weights.sum()
    return out


def inputs(queries):
    """Ragged rows: slots 0..7 hold prompts of 8, 5 and 3 tokens, the next ones two new tokens of rows 0 and 1."""
    random = np.random.default_rng(3)
    q, k, v = (random.normal(size=shape) for shape in ((B, queries, N, H), (B, S, K, H), (B, S, K, H)))
    lengths = np.array([8, 5, 3])
    slots = np.arange(S)[None]
    new = (slots >= 8) & (slots < 8 + queries)
    k_segments = ((slots < lengths[:, None]) | (new & (np.arange(B) < 2)[:, None])).astype(np.int32)
    k_positions = np.where(slots < 8, slots, lengths[:, None] + slots - 8).astype(np.int32)
    q_positions = (lengths[:, None] + np.arange(queries)[None]).astype(np.int32)
    q_segments = np.array([[1], [1], [0]], np.int32) * np.ones((1, queries), np.int32)
    return q, k, v, Places(q_positions, k_positions, q_segments, k_segments)


@pytest.mark.parametrize(
    ('queries', 'window', 'soft_cap'), [(1, None, None), (2, 4, 5.0)], ids=['decoding', 'verifying_window_soft_cap']
)
def test_equals_a_float64_softmax_over_the_visible_keys(queries, window, soft_cap):
    q, k, v, places = inputs(queries)
    rule = Scores(Mask(window=window), 0.35, soft_cap)
    got = jax.jit(cached_attention, static_argnums=4)(
        jnp.float32(q), jnp.float32(k.transpose(0, 2, 3, 1)), jnp.float32(v.transpose(0, 2, 1, 3)), places, rule
    )
    wanted = reference(q, k, v, places, rule)
    np.testing.assert_allclose(got, wanted, atol=2e-6)
    assert not np.any(np.asarray(got)[2]), 'a query that sees no key gives exactly 0'
