"""Divergences between the distributions of a teacher (p) and of a student (q), term by term, with gradients by hand.

A divergence is a sum over words of a term in the two log-probabilities. Beside each term stands its slope, the
student's probability times the derivative in it, w = Q dD/dQ: the gradient with respect to the student's logits is then
w - Q sum(w), whatever the divergence. The words may also be buckets of words, such as all that a sparse target leaves
out: a bucket's slope is shared by its words in proportion to their probabilities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

# (p, q) -> (term, slope); log-probabilities of equal shape.
Terms = Callable[..., tuple]


def _expected(logp, value):
    """P times a value, 0 where P is 0 whatever the value is."""
    probability = jnp.exp(logp)
    return jnp.where(probability > 0, probability * jnp.where(probability > 0, value, 0), 0)


def forward_kl(p, q):
    """KL(P || Q) = sum P (p - q)."""
    return _expected(p, p - q), -jnp.exp(p)


def reverse_kl(p, q):
    """KL(Q || P) = sum Q (q - p)."""
    return _expected(q, q - p), _expected(q, q - p + 1)


def total_variation(p, q):
    """TV(P, Q) = sum |P - Q| / 2 (Wen et al. 2023)."""
    difference = jnp.exp(q) - jnp.exp(p)
    return jnp.abs(difference) / 2, jnp.exp(q) * jnp.sign(difference) / 2


def _mixture(weight: float, first, second):
    """log(weight * exp(first) + (1 - weight) * exp(second))."""
    return jnp.logaddexp(math.log(weight) + first, math.log1p(-weight) + second)


def jsd(p, q, beta: float):
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (Agarwal et al. 2023, equation 1)."""
    m = _mixture(beta, p, q)
    student = (1 - beta) * _expected(q, q - m)
    return beta * _expected(p, p - m) + student, student


def skew_kl(p, q, skew: float):
    """KL(P || skew P + (1 - skew) Q) (Ko et al. 2024, DistiLLM, equation 3)."""
    m = _mixture(skew, p, q)
    return _expected(p, p - m), -(1 - skew) * _expected(p, jnp.exp(q - m))


def skew_reverse_kl(p, q, skew: float):
    """KL(Q || skew Q + (1 - skew) P) (Ko et al. 2024, DistiLLM)."""
    m = _mixture(skew, q, p)
    return _expected(q, q - m), _expected(q, q - m + 1 - skew * jnp.exp(q - m))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """One divergence with its numbers; a hashable function of two arrays of log-probabilities, see `Terms`.

    beta (of 'jsd') weighs the teacher, in the mixture and outside. `normalized` divides by beta (1 - beta): its limits
    are the forward divergence at beta = 0 and the reverse one at 1. Without it both ends are 0, so they are refused.
    skew (of the skewed ones) weighs the first argument of the divergence in its mixture; at 0 they are the plain ones.

    Raises:
        ValueError: another name, or numbers out of range.
    """

    name: str = 'forward_kl'
    beta: float = 0.5
    skew: float = 0.1
    normalized: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f'divergence={self.name!r}: expected one of {", ".join(NAMES)}')
        if not 0 <= self.skew < 1:
            raise ValueError(f'skew={self.skew}: expected a number from 0 to below 1')
        if not 0 <= self.beta <= 1:
            raise ValueError(f'beta={self.beta}: expected a number from 0 to 1')
        if self.name == 'jsd' and not self.normalized and self.beta in (0, 1):
            raise ValueError(
                f'beta={self.beta}: the divergence is 0 there for any student: expected a number between 0 and 1, or '
                'normalized=True'
            )

    def __call__(self, p, q):
        """(terms, slopes) of log-probabilities p of the teacher and q of the student."""
        if self.name == 'jsd':
            if self.beta in (0, 1):
                return (reverse_kl if self.beta else forward_kl)(p, q)
            terms, slopes = jsd(p, q, self.beta)
            scale = 1 / (self.beta * (1 - self.beta)) if self.normalized else 1.0
            return scale * terms, scale * slopes
        if self.name in SKEWED:
            skewed, plain = SKEWED[self.name]
            return skewed(p, q, self.skew) if self.skew else plain(p, q)
        return PLAIN[self.name](p, q)


PLAIN: dict[str, Terms] = {'forward_kl': forward_kl, 'reverse_kl': reverse_kl, 'total_variation': total_variation}
SKEWED: dict[str, tuple[Terms, Terms]] = {
    'skew_kl': (skew_kl, forward_kl),
    'skew_reverse_kl': (skew_reverse_kl, reverse_kl),
}
NAMES = (*PLAIN, 'jsd', *SKEWED)
