"""Losses of distillation as pure functions of logits or hidden states: each a sum over tokens and a count.

For notebooks and for objectives of one's own. A training job computes the same from hidden states and heads without
ever holding logits (jpt/kernels/head_loss.py). Everything is in at least float32. A token with weight 0 may hold
anything, NaN and ids that are none included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpt.kernels.distillation_loss import distillation
from jpt.kernels.divergences import Divergence
from jpt.kernels.sparse_target import SparseTarget
from jpt.kernels.token_losses import TokenLoss, cross_entropy
from jpt.kernels.vocab_shard import VocabShard

Pair = tuple[jax.Array, jax.Array]
# The least norm that a cosine divides by.
LEAST_NORM = 1e-8


def divergence(
    student_logits: jax.Array,
    teacher: jax.Array | SparseTarget,
    weights: jax.Array,
    kind: Divergence = Divergence(),  # noqa: B008 (frozen)
    *,
    temperature: float = 1.0,
    squared: bool = True,
    form: Literal['tail', 'truncated', 'renormalized'] = 'tail',
) -> Pair:
    """sum of weight * T^2 * D(teacher, student) over tokens, both at temperature T, and the sum of the weights.

    Args:
        student_logits: [..., V], differentiated.
        teacher: logits [..., V], or the likeliest words of each token at this temperature.
        weights: [...], 0 where a token does not count; fractions are allowed.
        kind: which divergence, see kernels/divergences.py.
        squared: whether T^2 is there.
        form: what becomes of the words that a sparse target leaves out, see kernels/sparse_target.py.

    Raises:
        ValueError: a temperature that is not positive, or a form that the divergence cannot have.
    """
    sparse = isinstance(teacher, SparseTarget)
    loss = distillation((1.0, kind), temperature=temperature, squared=squared, form=form if sparse else None)
    lead = student_logits.ndim - 1
    given: dict[str, Any] = {'sparse_target' if sparse else 'teacher_logits': teacher}
    given['targets'] = jnp.zeros(student_logits.shape[:-1], jnp.int32)
    args = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), given)
    return _summed(loss, student_logits, args, weights)


def label_cross_entropy(student_logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Pair:
    """sum of weight * -log softmax(logits)[target] over tokens, and the sum of the weights."""
    return _summed(cross_entropy(), student_logits, {'targets': targets.reshape(-1)}, weights)


def sampled_forward_kl(student_logp: jax.Array, teacher_logp: jax.Array, weights: jax.Array) -> Pair:
    """sum of weight * (log P(w) - log Q(w)) over words w that the teacher P drew, and the sum of the weights.

    In expectation over w that is KL(P || Q), and the gradient is its gradient: that of the cross-entropy on w, from
    which the value differs by an estimate of the teacher's entropy (Kim and Rush 2016).

    Args:
        student_logp, teacher_logp: [...], log-probabilities of each drawn word in the whole vocabulary, at the
            temperature at which it was drawn; the student's is differentiated.
        weights: [...], 0 where a word does not count.
    """
    return _over_words(lambda apart: -apart, student_logp, teacher_logp, weights)


def sampled_reverse_kl(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    weights: jax.Array,
    *,
    estimator: Literal['k2', 'k3'] = 'k2',
) -> Pair:
    """sum of weight * an estimator of KL(Q || P) over words w that the student Q drew, and the sum of the weights.

    With d = log Q(w) - log P(w), the estimators of Schulman 2020 ("Approximating KL Divergence"), differentiated in
    log Q(w) while w stays:

        k2 = d^2 / 2              gradient d log Q', in expectation that of KL(Q || P); the value is biased
        k3 = exp(-d) - 1 + d      the value is KL(Q || P) in expectation, the gradient that of the forward KL(P || Q)

    So k2 is the one to train with and k3 the one to measure with. k1 = d has the right expected value, but its
    gradient log Q' is 0 in expectation: whatever a step does by it is noise.

    Args: as `sampled_forward_kl`, of words that the student drew itself, with these weights of it.

    Raises:
        ValueError: k1 as a loss, or an unknown estimator.
    """
    if estimator == 'k1':
        raise ValueError(
            "sampled_reverse_kl: estimator='k1': its gradient is 0 in expectation, so it teaches nothing: expected k2 "
            'as a loss, or k3 as a measure'
        )
    if estimator not in SAMPLED:
        raise ValueError(f'sampled_reverse_kl: estimator={estimator!r}: expected one of {", ".join(SAMPLED)}')
    return _over_words(SAMPLED[estimator], student_logp, teacher_logp, weights)


# Estimators of KL(Q || P) by d = log Q(w) - log P(w), w drawn by Q.
SAMPLED: dict[str, Callable[[jax.Array], jax.Array]] = {
    'k2': lambda apart: jnp.square(apart) / 2,
    'k3': lambda apart: jnp.expm1(-apart) + apart,
}


def _over_words(
    estimator: Callable[[jax.Array], jax.Array], student: jax.Array, teacher: jax.Array, weights: jax.Array
) -> Pair:
    """The weighted sum of a function of log Q(w) - log P(w), of which the teacher's part is not trained."""
    wide = jnp.promote_types(student.dtype, jnp.float32)
    used = weights != 0
    apart = jnp.where(used, student.astype(wide), 0) - jnp.where(used, jax.lax.stop_gradient(teacher).astype(wide), 0)
    values = jnp.where(used, weights.astype(wide) * estimator(apart), 0)
    return jnp.sum(values), jnp.sum(weights.astype(wide))


def _summed(loss: TokenLoss, logits: jax.Array, args: Any, weights: jax.Array) -> Pair:
    flat = logits.reshape(-1, logits.shape[-1]).astype(jnp.promote_types(logits.dtype, jnp.float32))
    weights = weights.reshape(-1).astype(flat.dtype)
    return _weighed(loss, flat, weights, args), jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighed(loss: TokenLoss, logits_NV: jax.Array, weights_N: jax.Array, args: Any) -> jax.Array:
    """The weighted sum of a token loss, whose gradient it knows itself."""
    return _forward(loss, logits_NV, weights_N, args)[0]


def _forward(loss: TokenLoss, logits_NV: jax.Array, weights_N: jax.Array, args: Any) -> tuple[jax.Array, jax.Array]:
    vocab = VocabShard((), logits_NV.shape[1], logits_NV.shape[1])
    values, gradient, _ = loss(logits_NV, args, None, vocab)
    used = weights_N != 0
    total = jnp.sum(jnp.where(used, weights_N * values, 0))
    return total, jnp.where(used[:, None], weights_N[:, None] * gradient, 0)


def _backward(loss: TokenLoss, gradient_NV: jax.Array, slope: jax.Array) -> tuple[jax.Array, None, None]:
    del loss
    return slope * gradient_NV, None, None


_weighed.defvjp(_forward, _backward)


def mean_squared_error(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> Pair:
    """sum of weight * mean over features of (s - t)^2, and the sum of the weights; hidden states are [..., D]."""
    return _over_tokens(lambda s, t: jnp.mean(jnp.square(s - t), axis=-1), student, teacher, weights)


def cosine_distance(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> Pair:
    """sum of weight * (1 - cos(s, t)), with norms of at least LEAST_NORM, and the sum of the weights."""

    def distance(s: jax.Array, t: jax.Array) -> jax.Array:
        return 1 - jnp.sum(_unit(s) * _unit(t), axis=-1)

    return _over_tokens(distance, student, teacher, weights)


def smooth_l1(student: jax.Array, teacher: jax.Array, weights: jax.Array, *, beta: float = 1.0) -> Pair:
    """sum of weight * mean over features of d^2 / (2 beta) where |d| = |s - t| < beta, else |d| - beta / 2.

    Raises:
        ValueError: beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f'smooth_l1: beta={beta}: expected a positive number')

    def distance(s: jax.Array, t: jax.Array) -> jax.Array:
        apart = jnp.abs(s - t)
        return jnp.mean(jnp.where(apart < beta, jnp.square(apart) / (2 * beta), apart - beta / 2), axis=-1)

    return _over_tokens(distance, student, teacher, weights)


def _unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, LEAST_NORM), whose gradient at 0 is finite."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, LEAST_NORM**2))


def _over_tokens(
    distance: Callable[[jax.Array, jax.Array], jax.Array], student: jax.Array, teacher: jax.Array, weights: jax.Array
) -> Pair:
    """The weighted sum of a distance [...] between hidden states [..., D], of which the teacher's is not trained."""
    wide = jnp.promote_types(student.dtype, jnp.float32)
    used = (weights != 0)[..., None]
    # Cleared before and not only after: a NaN times a gradient of 0 is NaN.
    s, t = (jnp.where(used, x.astype(wide), 0) for x in (student, jax.lax.stop_gradient(teacher)))
    values = jnp.where(used[..., 0], weights.astype(wide) * distance(s, t), 0)
    return jnp.sum(values), jnp.sum(weights.astype(wide))
