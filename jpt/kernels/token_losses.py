"""Losses of single tokens on a chunk of logits, with their gradients by hand, over a vocabulary that may be cut.

A token loss is a hashable callable (logits_CV, args, shared, vocab) -> (loss_C, dlogits_CV, {name: values_C}): the loss
of every token, its gradient with respect to the local logits, and what to report. It names its metrics in `metrics`.
Written with `VocabShard`, it is the same for a whole vocabulary and for a part; nothing is differentiated through.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jpt.kernels.local import axis_index, axis_size, pmax, psum

# The logit of a padded column. Finite, so that a product with a zero probability is zero.
PADDED = -1e30


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that are here: `size` of them, of which those below `vocab_size` overall are real.

    Columns go over the manual ones of `axes`, the first axis varying slowest.
    """

    axes: tuple[str, ...]
    size: int
    vocab_size: int

    @property
    def columns_V(self) -> jax.Array:
        """Token id of every local column, int32."""
        return axis_index(self.axes) * self.size + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def padded(self) -> bool:
        """Whether the vocabulary, over all shards, has columns that are not real."""
        return self.size * axis_size(self.axes) != self.vocab_size

    def mask(self, logits_CV, value=PADDED):
        """The same logits with padded columns set to `value`."""
        if not self.padded:
            return logits_CV
        return jnp.where((self.columns_V < self.vocab_size)[None], logits_CV, value)

    def sum(self, parts):
        """Sum over shards of every leaf."""
        return psum(parts, self.axes)

    def max(self, logits_CV):
        """Largest logit of every token, [C]."""
        return pmax(jnp.max(logits_CV, axis=-1), self.axes)

    def hits(self, ids_C):
        """Where the local column is the token's id, bool [C, V]."""
        return self.columns_V[None] == ids_C[:, None]

    def pick(self, values_CV, ids_C):
        """The local part of values at the token's id, [C]: 0 where the column is elsewhere. Sum over shards for it."""
        column = ids_C - axis_index(self.axes) * self.size
        here = (column >= 0) & (column < self.size)
        found = jnp.take_along_axis(values_CV, jnp.clip(column, 0, self.size - 1)[:, None], axis=-1)[:, 0]
        return jnp.where(here, found, 0)


class TokenLoss(Protocol):
    """What `linear_loss` calls; implementations are frozen dataclasses, so that they can be static arguments."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what the third result holds."""

    def __call__(self, logits_CV: jax.Array, args: Any, shared: Any, vocab: VocabShard) -> tuple[Any, Any, Any]:
        """(loss_C, dlogits_CV, {name: values_C}), all in the dtype of the logits."""


def _log_normalizer(logits_CV, peak_C, vocab: VocabShard):
    """log sum exp over the whole vocabulary, [C]."""
    return peak_C + jnp.log(vocab.sum(jnp.sum(jnp.exp(logits_CV - peak_C[:, None]), axis=-1)))


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """See `cross_entropy`."""

    z_loss: float
    metrics: tuple[str, ...] = ('loss', 'ce', 'accuracy')

    def __call__(self, logits_CV, args, shared, vocab: VocabShard):
        del shared
        targets = args['targets']
        peak = vocab.max(logits_CV)
        lse = _log_normalizer(logits_CV, peak, vocab)
        target_logit = vocab.sum(vocab.pick(logits_CV, targets))
        ce = lse - target_logit
        loss = ce + self.z_loss * lse**2
        slope = 1 + 2 * self.z_loss * lse
        dlogits = slope[:, None] * jnp.exp(logits_CV - lse[:, None]) - vocab.hits(targets)
        return loss, dlogits, {'loss': loss, 'ce': ce, 'accuracy': (target_logit >= peak).astype(loss.dtype)}


def cross_entropy(*, z_loss: float = 0.0) -> TokenLoss:
    """-log softmax(logits)[target] + z_loss * logsumexp(logits)^2; reads args['targets'] (int32 [N]).

    Reports 'loss', 'ce' (without the z term) and 'accuracy' (no logit is above the target's). The z term is that of
    PaLM (Chowdhery et al. 2022, section 5).
    """
    return CrossEntropy(z_loss)


def forward_kl(teacher_logp_CV, student_logp_CV, vocab: VocabShard):
    """KL(teacher || student) of every token [C], and its gradient with respect to the student's logits [C, V]."""
    teacher = jnp.exp(teacher_logp_CV)
    value = vocab.sum(jnp.sum(teacher * (teacher_logp_CV - student_logp_CV), axis=-1))
    return value, jnp.exp(student_logp_CV) - teacher


DIVERGENCES = {'forward_kl': forward_kl}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """See `distillation`."""

    alpha: float
    temperature: float
    soft_cap: float | None
    divergence: str
    metrics: tuple[str, ...] = ('loss', 'kl', 'ce', 'agreement', 'accuracy')

    def __call__(self, logits_CV, args, shared, vocab: VocabShard):
        targets, temperature = args['targets'], self.temperature
        teacher_CV = self._teacher(args, shared, logits_CV.dtype, vocab)
        peak, teacher_peak = vocab.max(logits_CV), vocab.max(teacher_CV)
        cooled, teacher_cooled = logits_CV / temperature, teacher_CV / temperature
        cooled_lse = _log_normalizer(cooled, peak / temperature, vocab)
        teacher_lse = _log_normalizer(teacher_cooled, teacher_peak / temperature, vocab)
        kl, dkl = DIVERGENCES[self.divergence](
            teacher_cooled - teacher_lse[:, None], cooled - cooled_lse[:, None], vocab
        )
        lse = cooled_lse if temperature == 1 else _log_normalizer(logits_CV, peak, vocab)
        target_logit = vocab.sum(vocab.pick(logits_CV, targets))
        ce = lse - target_logit
        both = jnp.any((logits_CV == peak[:, None]) & (teacher_CV == teacher_peak[:, None]), axis=-1)
        loss = self.alpha * temperature**2 * kl + (1 - self.alpha) * ce
        # d(logits / T) contributes 1 / T to the first term.
        dlogits = self.alpha * temperature * dkl
        if self.alpha != 1:
            dlogits += (1 - self.alpha) * (jnp.exp(logits_CV - lse[:, None]) - vocab.hits(targets))
        metrics = {
            'loss': loss,
            'kl': kl,
            'ce': ce,
            'agreement': jnp.minimum(vocab.sum(both.astype(loss.dtype)), 1),
            'accuracy': (target_logit >= peak).astype(loss.dtype),
        }
        return loss, dlogits, metrics

    def _teacher(self, args, shared, dtype, vocab: VocabShard):
        """The teacher's logits [C, V] of the local columns, from its hidden states and its head."""
        hidden, kernel = args['teacher_hidden'], shared['teacher_kernel']
        logits = jax.lax.dot_general(
            hidden, kernel.astype(hidden.dtype), (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return vocab.mask(logits)


def distillation(
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    divergence: str = 'forward_kl',
) -> TokenLoss:
    """alpha * T^2 * KL(teacher || student, both at temperature T) + (1 - alpha) * cross-entropy (Hinton et al. 2015).

    Reads args['targets'] (int32 [N]) and args['teacher_hidden'] ([N, E]), shared['teacher_kernel'] ([V, E], padded
    as the student's): the teacher's logits are made chunk by chunk, with its own `soft_cap`. Reports 'loss', 'kl'
    (at T), 'ce' (at 1), 'agreement' (teacher and student share a largest logit) and 'accuracy'.

    Raises:
      ValueError: an unknown divergence, or a temperature that is not positive.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f'distillation: divergence={divergence!r}: expected one of {", ".join(DIVERGENCES)}')
    if not temperature > 0:
        raise ValueError(f'distillation: temperature={temperature}: expected a positive number')
    return Distillation(alpha, temperature, soft_cap, divergence)
