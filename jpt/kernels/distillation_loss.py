"""The token loss of distillation: divergences from a teacher, dense or sparse, and cross-entropy on labels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpt.kernels.divergences import Divergence
from jpt.kernels.sparse_target import FORMS, sparse_divergence
from jpt.kernels.token_losses import TokenLoss
from jpt.kernels.vocab_shard import VocabShard


@dataclasses.dataclass(frozen=True)
class Distillation:
    """See `distillation`."""

    terms: tuple[tuple[float, Divergence], ...]
    alpha: float
    temperature: float
    squared: bool
    soft_cap: float | None
    form: str | None

    @property
    def metrics(self) -> tuple[str, ...]:
        tails = () if self.form is None else ('tail', 'student_tail')
        return ('loss', 'ce', 'agreement', 'accuracy', *(name_of(each) for _, each in self.terms), *tails)

    def __call__(self, logits_CV, args, shared, vocab: VocabShard):
        targets, temperature = args['targets'], self.temperature
        peak = vocab.max(logits_CV)
        cooled = logits_CV / temperature
        cooled_lse = vocab.log_normalizer(cooled, peak / temperature)
        against = self._sparse if self.form is not None else self._dense
        values, gradient, metrics = against(cooled - cooled_lse[:, None], logits_CV, peak, args, shared, vocab)
        lse = cooled_lse if temperature == 1 else vocab.log_normalizer(logits_CV, peak)
        target_logit = vocab.sum(vocab.pick(logits_CV, targets))
        ce = lse - target_logit
        scale = self.alpha * (temperature**2 if self.squared else 1)
        # d(logits / T) contributes 1 / T.
        dlogits = scale / temperature * gradient
        if self.alpha != 1:
            dlogits += (1 - self.alpha) * (jnp.exp(logits_CV - lse[:, None]) - vocab.hits(targets))
        weighted = sum(weight * value for (weight, _), value in zip(self.terms, values, strict=True))
        loss = scale * weighted + (1 - self.alpha) * ce
        metrics |= {name_of(each): value for (_, each), value in zip(self.terms, values, strict=True)}
        metrics |= {'loss': loss, 'ce': ce, 'accuracy': (target_logit >= peak).astype(loss.dtype)}
        return loss, dlogits, metrics

    def _dense(self, logq_CV, logits_CV, peak, args, shared, vocab: VocabShard):
        """(values, weighted gradient in the cooled logits, metrics) against the teacher's logits."""
        teacher_CV = self._teacher(args, shared, logits_CV.dtype, vocab)
        teacher_peak = vocab.max(teacher_CV)
        cooled = teacher_CV / self.temperature
        logp_CV = cooled - vocab.log_normalizer(cooled, teacher_peak / self.temperature)[:, None]
        found = [divergence(logp_CV, logq_CV) for _, divergence in self.terms]
        values = [vocab.sum(jnp.sum(terms, axis=-1)) for terms, _ in found]
        slopes = sum(weight * slope for (weight, _), (_, slope) in zip(self.terms, found, strict=True))
        total = vocab.sum(jnp.sum(slopes, axis=-1))
        both = jnp.any((logits_CV == peak[:, None]) & (teacher_CV == teacher_peak[:, None]), axis=-1)
        agreement = jnp.minimum(vocab.sum(both.astype(logits_CV.dtype)), 1)
        return values, slopes - jnp.exp(logq_CV) * total[:, None], {'agreement': agreement}

    def _sparse(self, logq_CV, logits_CV, peak, args, shared, vocab: VocabShard):
        """The same against the likeliest words of the teacher."""
        del shared
        assert self.form is not None
        target = args['sparse_target']
        found = [sparse_divergence(divergence, self.form, target, logq_CV, vocab) for _, divergence in self.terms]
        values = [value for value, _, _ in found]
        gradient = sum(weight * own for (weight, _), (_, own, _) in zip(self.terms, found, strict=True))
        best = jnp.take_along_axis(target.ids, jnp.argmax(target.logp, axis=-1)[:, None], axis=-1)[:, 0]
        agreement = (vocab.sum(vocab.pick(logits_CV, best)) >= peak).astype(logits_CV.dtype)
        tail, student_tail = (jnp.exp(log_mass) for log_mass in found[0][2])
        return values, gradient, {'agreement': agreement, 'tail': tail, 'student_tail': student_tail}

    def _teacher(self, args, shared, dtype, vocab: VocabShard):
        """The teacher's logits [C, V] of the local columns: as they are given, or from hidden states and head."""
        if 'teacher_logits' in args:
            return vocab.mask(args['teacher_logits'].astype(dtype))
        hidden, kernel = args['teacher_hidden'], shared['teacher_kernel']
        logits = jax.lax.dot_general(
            hidden, kernel.astype(hidden.dtype), (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return vocab.mask(logits)


def name_of(divergence: Divergence) -> str:
    """The name of a divergence among metrics."""
    return 'kl' if divergence.name == 'forward_kl' else divergence.name


def distillation(
    *terms: tuple[float, Divergence],
    alpha: float = 1.0,
    temperature: float = 1.0,
    squared: bool = True,
    soft_cap: float | None = None,
    form: str | None = None,
) -> TokenLoss:
    """alpha * T^2 * sum of weight * divergence (both sides at temperature T) + (1 - alpha) * cross-entropy.

    With one forward KL that is Hinton et al. 2015. Reads args['targets'] (int32 [N]), and of the teacher
    args['teacher_hidden'] ([N, E]) and shared['teacher_kernel'] ([V, E], padded as the student's), whose logits are
    made chunk by chunk, or args['teacher_logits'] of the columns that are here (after any soft cap), or
    args['sparse_target'], a SparseTarget at this temperature. Reports 'loss', 'ce' (at 1),
    every divergence (at T, unweighted; 'kl' is the forward one), 'agreement' (teacher and student share a largest
    logit), 'accuracy', and of a sparse target 'tail' and 'student_tail', the mass outside of its words.

    Args:
      terms: (weight, divergence); none stands for the forward KL.
      squared: whether T^2 is there, which keeps the size of gradients as T grows.
      soft_cap: of the teacher's logits.
      form: None for a teacher by its hidden states; else what becomes of the words that a sparse target leaves out, see
        sparse_target.py.

    Raises:
      ValueError: a divergence that is given twice, a temperature that is not positive, an unknown form, or a loss that
        a student can escape.
    """
    terms = terms or ((1.0, Divergence()),)
    names = [name_of(each) for _, each in terms]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f'distillation: {", ".join(doubled)} is given twice: expected each divergence once')
    if not temperature > 0:
        raise ValueError(f'distillation: temperature={temperature}: expected a positive number')
    if form is not None and form not in FORMS:
        raise ValueError(f'distillation: form={form!r}: expected one of {", ".join(FORMS)}, or None')
    escaping = [each.name for _, each in terms if each.name in ('reverse_kl', 'skew_reverse_kl')]
    if form == 'renormalized' and escaping:
        raise ValueError(
            f'distillation: {escaping[0]} on renormalized words: the student may leave them at no cost, and nothing '
            "draws it back then: expected form='tail'"
        )
    return Distillation(terms, alpha, temperature, squared, soft_cap, form)
