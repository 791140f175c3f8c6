"""From logits to the next token: what is drawn, and how probable it was.

Every row of a batch has its own settings and its own seed, so one compiled program serves any mix, and what a row
draws depends on nothing but its logits, its seed and how many tokens it has drawn before.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one row are drawn; the defaults draw the most probable one.

    The steps are taken in this order: repetition_penalty, temperature, top_k, top_p, min_p. Temperature 0 is greedy: of
    the other settings only repetition_penalty matters then.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep the k most probable tokens, and those as probable as the k-th; 0 keeps all
    top_p: float = 1.0  # keep the most probable tokens that together reach this probability; 1 keeps all
    min_p: float = 0.0  # keep tokens at least this probable relative to the most probable one; 0 keeps all
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen; 1 is none
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ('temperature', 0 <= self.temperature < float('inf'), 'a number of at least 0 (0 is greedy)'),
            ('top_k', self.top_k >= 0 and self.top_k == int(self.top_k), 'an integer of at least 0 (0 keeps all)'),
            ('top_p', 0 < self.top_p <= 1, 'a number above 0 and at most 1 (1 keeps all)'),
            ('min_p', 0 <= self.min_p <= 1, 'a number from 0 (keeps all) to 1'),
            ('repetition_penalty', 0 < self.repetition_penalty < float('inf'), 'a number above 0 (1 is none)'),
            ('seed', 0 <= self.seed < 2**32, 'an integer from 0 to 4294967295'),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f'{name}={getattr(self, name)!r}: expected {expected}')


class Sampling(NamedTuple):
    """The settings of a batch, [B] each; see SamplingConfig."""

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    min_p: jax.Array  # float32
    repetition_penalty: jax.Array  # float32
    seed: jax.Array  # uint32


class Logps(NamedTuple):
    """The logarithm of the probability of each row's token, float32 [B].

    `model` is the model's own: log_softmax of the logits, at temperature 1 and before any processing. `sampled` is that
    of the distribution drawn from; 0 in greedy rows, where the choice is certain.
    """

    model: jax.Array
    sampled: jax.Array


def stack(configs: Sequence[SamplingConfig]) -> Sampling:
    """The settings of several rows as arrays."""
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32)
    columns = [[getattr(config, name) for config in configs] for name in Sampling._fields]
    return Sampling(*(jnp.asarray(np.array(c, d)) for c, d in zip(columns, dtypes, strict=True)))


def draw(
    logits_BV: jax.Array, seen_BV: jax.Array | None, sampling: Sampling, step_B: jax.Array, with_logps: bool = True
) -> tuple[jax.Array, Logps | None]:
    """Draws the next token of every row: int32 [B], and how probable it was if `with_logps`.

    logits_BV: float32, -inf where no token is. seen_BV: bool, the tokens of prompt and output so far; None where no
    row has a repetition penalty. step_B: int32, how many tokens the row has drawn before.
    A draw is the argmax of scores plus Gumbel noise from the key fold_in(key(seed), step).
    """
    penalized = logits_BV if seen_BV is None else penalize(logits_BV, seen_BV, sampling.repetition_penalty)
    greedy = first_argmax(penalized)
    sampled = sampling.temperature > 0

    def sample(scores_BV: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        scores_BV = process(scores_BV, sampling)
        noise_BV = jax.vmap(lambda seed, step: _gumbel(seed, step, scores_BV.shape[1]))(sampling.seed, step_B)
        tokens = jnp.where(sampled, first_argmax(scores_BV + noise_BV), greedy)
        return tokens, jnp.where(sampled, log_probability(scores_BV, tokens), 0) if with_logps else None

    def choose(scores_BV: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return greedy, jnp.zeros(scores_BV.shape[:1], scores_BV.dtype) if with_logps else None

    tokens, sampled_logp = jax.lax.cond(jnp.any(sampled), sample, choose, penalized)
    if sampled_logp is None:
        return tokens, None
    return tokens, Logps(log_probability(logits_BV, tokens), sampled_logp)


def _gumbel(seed: jax.Array, step: jax.Array, size: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), (size,), jnp.float32)


def first_argmax(scores_BV: jax.Array) -> jax.Array:
    """The first index of the largest score in each row, int32 [B]."""
    largest = jnp.max(_folded(jnp.maximum, scores_BV), axis=-1, keepdims=True)
    places = jnp.arange(scores_BV.shape[1], dtype=jnp.int32)[None]
    found_BV = jnp.where(scores_BV == largest, places, scores_BV.shape[1])
    return jnp.min(_folded(jnp.minimum, found_BV), axis=-1)


def _folded(join: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, lanes: int = 64) -> jax.Array:
    """The last axis joined half with half down to `lanes`.

    On CPU these steps become vector instructions, which XLA does not make of a reduction; elsewhere they cost nothing.
    """
    while x.shape[-1] % 2 == 0 and x.shape[-1] > lanes:
        x = join(x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])
    return jax.lax.optimization_barrier(x)


def log_probability(scores_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """log_softmax(scores)[token] of each row, [B]."""
    chosen = jnp.take_along_axis(scores_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(scores_BV, axis=-1)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Divides the positive and multiplies the negative logits of seen tokens (Keskar et al. 2019, arXiv:1909.05858).

    The paper divides all of them, which would make negative ones more probable; this is what its users do.
    """
    penalty = penalty_B[:, None]
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def process(scores_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, then top-k, top-p and min-p: scores [B, V] whose softmax is drawn from, -inf where cut off.

    Rows of temperature 0 are taken at temperature 1. What no row asks for is skipped.
    """
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1)
    scores_BV = scores_BV / temperature[:, None]
    for keep, asked in (
        (_in_top_k, (sampling.top_k > 0) & (sampling.top_k < scores_BV.shape[1])),
        (_in_top_p, sampling.top_p < 1),
        (_in_min_p, sampling.min_p > 0),
    ):

        def cut(scores: jax.Array, keep=keep, asked=asked) -> jax.Array:
            return jnp.where(keep(scores, sampling) | ~asked[:, None], scores, -jnp.inf)

        scores_BV = jax.lax.cond(jnp.any(asked), cut, lambda scores: scores, scores_BV)
    return scores_BV


def _in_top_k(scores_BV: jax.Array, sampling: Sampling) -> jax.Array:
    ones = jnp.ones_like(scores_BV)
    return _ordered(scores_BV) >= _threshold(scores_BV, ones, sampling.top_k.astype(jnp.float32))[:, None]


def _in_top_p(scores_BV: jax.Array, sampling: Sampling) -> jax.Array:
    return _ordered(scores_BV) >= _threshold(scores_BV, jax.nn.softmax(scores_BV, axis=-1), sampling.top_p)[:, None]


def _in_min_p(scores_BV: jax.Array, sampling: Sampling) -> jax.Array:
    relative = jnp.exp(scores_BV - jnp.max(scores_BV, axis=-1, keepdims=True))
    return relative >= sampling.min_p[:, None]


def _ordered(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the float32 scores (of IEEE 754: negative numbers are sign and magnitude)."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(scores_BV: jax.Array, weights_BV: jax.Array, need_B: jax.Array) -> jax.Array:
    """The largest ordered score for which the weights of all scores at or above it add up to `need`, uint32 [B].

    Bisection over the 32 bits of a score: exact, without a sort, and of equal scores all or none are above it.
    """
    keys_BV = _ordered(scores_BV)

    def narrow(bit: jax.Array, found_B: jax.Array) -> jax.Array:
        higher_B = found_B | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        above = jnp.sum(jnp.where(keys_BV >= higher_B[:, None], weights_BV, 0), axis=-1)
        return jnp.where(above >= need_B, higher_B, found_B)

    return jax.lax.fori_loop(0, 32, narrow, jnp.zeros(scores_BV.shape[:1], jnp.uint32))
