"""The token loss of distillation: divergences from teachers, dense or sparse, and cross-entropy on labels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpt.kernels.divergences import Divergence
from jpt.kernels.sparse_target import FORMS, sparse_divergence
from jpt.kernels.token_losses import TokenLoss
from jpt.kernels.vocab_shard import VocabShard


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the loss needs to know of a teacher whose logits it sees.

    vocab_size: words it has, None for those of the student. Of two sizes the first words, which both have, are
    compared, and neither side's other columns take part. soft_cap: of its logits. name: of its own metrics, which
    there are where there are several teachers.
    """

    vocab_size: int | None = None
    soft_cap: float | None = None
    name: str = ''


@dataclasses.dataclass(frozen=True)
class Distillation:
    """See `distillation`."""

    terms: tuple[tuple[float, Divergence], ...]
    alpha: float
    temperature: float
    squared: bool
    teachers: tuple[Teacher, ...]
    form: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the divergences, as metrics."""
        return tuple(name_of(divergence) for _, divergence in self.terms)

    @property
    def metrics(self) -> tuple[str, ...]:
        tails = () if self.form is None else ('tail', 'student_tail')
        own = [own_name(name, teacher) for teacher in self._named() for name in ('share', *self.names)]
        weighted = [f'{name}_weighted' for name in ('ce', *self.names)]
        plain = ('loss', 'ce', 'agreement', 'accuracy', 'entropy', 'teacher_entropy')
        return (*plain, *self.names, *weighted, *own, *tails)

    def __call__(self, logits_CV, args, shared, vocab: VocabShard):
        targets, temperature = args['targets'], self.temperature
        peak = vocab.max(logits_CV)
        lse = vocab.log_normalizer(logits_CV, peak)
        target_logit = vocab.sum(vocab.pick(logits_CV, targets))
        ce = lse - target_logit
        weights, ce_weight = self.weights(args)
        against = self._sparse if self.form is not None else self._dense
        values, gradient, metrics = against(weights, logits_CV, args, shared, vocab)
        squared = temperature**2 if self.squared else 1
        # d(logits / T) contributes 1 / T.
        dlogits = squared / temperature * gradient
        if not isinstance(ce_weight, float) or ce_weight:
            dlogits += _each(ce_weight) * (jnp.exp(logits_CV - lse[:, None]) - vocab.hits(targets))
        parts = {f'{name}_weighted': squared * w * v for name, w, v in zip(self.names, weights, values, strict=True)}
        parts['ce_weighted'] = ce_weight * ce
        loss = sum(parts.values(), jnp.zeros_like(ce))
        metrics |= dict(zip(self.names, values, strict=True)) | parts
        metrics |= {'loss': loss, 'ce': ce, 'accuracy': (target_logit >= peak).astype(loss.dtype)}
        return loss, dlogits, metrics

    def weights(self, args):
        """Of every divergence, and of the cross-entropy: numbers, or one for each token."""
        if 'mixture' in args:
            *weights, ce = (args['mixture'][:, k] for k in range(len(self.terms) + 1))
            return weights, ce
        return [self.alpha * weight for weight, _ in self.terms], 1 - self.alpha

    def _dense(self, weights, logits_CV, args, shared, vocab: VocabShard):
        """(values, weighted gradient in the cooled logits, metrics) against the logits of all teachers."""
        values: list = [0] * len(self.terms)
        gradient, metrics = 0, dict.fromkeys(('entropy', 'teacher_entropy', 'agreement'), 0)
        for i, teacher in enumerate(self.teachers):
            common = _common(vocab, teacher)
            peak, logq_CV = self._cooled(common.mask(logits_CV), common)
            teacher_CV = common.mask(self._logits(i, args, shared, logits_CV.dtype))
            teacher_peak, logp_CV = self._cooled(teacher_CV, common)
            found = [divergence(logp_CV, logq_CV) for _, divergence in self.terms]
            own = [vocab.sum(jnp.sum(terms, axis=-1)) for terms, _ in found]
            slopes = sum(_each(weight) * slope for weight, (_, slope) in zip(weights, found, strict=True))
            total = vocab.sum(jnp.sum(slopes, axis=-1))
            both = jnp.any((logits_CV == peak[:, None]) & (teacher_CV == teacher_peak[:, None]), axis=-1)
            share = args['share'][:, i] if 'share' in args else 1 / len(self.teachers)
            values = [value + share * more for value, more in zip(values, own, strict=True)]
            gradient += _each(share) * (slopes - jnp.exp(logq_CV) * total[:, None])
            found_metrics = {
                'entropy': _entropy(logq_CV, vocab),
                'teacher_entropy': _entropy(logp_CV, vocab),
                'agreement': jnp.minimum(vocab.sum(both.astype(logits_CV.dtype)), 1),
            }
            metrics |= {name: metrics[name] + share * value for name, value in found_metrics.items()}
            if len(self.teachers) > 1:
                parts = zip(('share', *self.names), (jnp.ones_like(peak), *own), strict=True)
                metrics |= {own_name(name, teacher.name): share * x for name, x in parts}
        return values, gradient, metrics

    def _cooled(self, logits_CV, vocab: VocabShard):
        """(largest logit [C], log-probabilities [C, V] at the temperature)."""
        peak = vocab.max(logits_CV)
        cooled = logits_CV / self.temperature
        return peak, cooled - vocab.log_normalizer(cooled, peak / self.temperature)[:, None]

    def _sparse(self, weights, logits_CV, args, shared, vocab: VocabShard):
        """The same against the likeliest words of a teacher."""
        del shared
        assert self.form is not None
        target, vocab = args['sparse_target'], _common(vocab, self.teachers[0])
        logits_CV = vocab.mask(logits_CV)
        peak, logq_CV = self._cooled(logits_CV, vocab)
        found = [sparse_divergence(divergence, self.form, target, logq_CV, vocab) for _, divergence in self.terms]
        values = [value for value, _, _ in found]
        gradient = sum(_each(weight) * own for weight, (_, own, _) in zip(weights, found, strict=True))
        best = jnp.take_along_axis(target.ids, jnp.argmax(target.logp, axis=-1)[:, None], axis=-1)[:, 0]
        agreement = (vocab.sum(vocab.pick(logits_CV, best)) >= peak).astype(logits_CV.dtype)
        log_tail, log_student_tail = found[0][2]
        p = jnp.where(target.ids >= 0, target.logp.astype(log_tail.dtype), -jnp.inf)
        words = jnp.sum(jnp.where(target.ids >= 0, jnp.exp(p) * p, 0), axis=-1)
        metrics = {
            'entropy': _entropy(logq_CV, vocab),
            'teacher_entropy': -words - jnp.exp(log_tail) * log_tail,
            'agreement': agreement,
            'tail': jnp.exp(log_tail),
            'student_tail': jnp.exp(log_student_tail),
        }
        return values, gradient, metrics

    def _logits(self, which: int, args, shared, dtype):
        """A teacher's logits [C, V] of the local columns: as they are given, or from hidden states and head."""
        if 'teacher_logits' in args:
            return _of(args['teacher_logits'], which).astype(dtype)
        hidden, kernel = _of(args['teacher_hidden'], which), _of(shared['teacher_kernel'], which)
        logits = jax.lax.dot_general(
            hidden, kernel.astype(hidden.dtype), (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        bias = _of(shared.get('teacher_bias'), which)
        if bias is not None:
            logits += bias.astype(dtype)[None]
        cap = self.teachers[which].soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _named(self) -> list[str]:
        return [teacher.name for teacher in self.teachers] if len(self.teachers) > 1 else []


def _common(vocab: VocabShard, teacher: Teacher) -> VocabShard:
    """The vocabulary that student and teacher share."""
    return dataclasses.replace(vocab, vocab_size=min(vocab.vocab_size, teacher.vocab_size or vocab.vocab_size))


def _entropy(logp_CV, vocab: VocabShard):
    """-sum p log p over the whole vocabulary [C]."""
    return -vocab.sum(jnp.sum(jnp.exp(logp_CV) * logp_CV, axis=-1))


def _each(weight):
    """A weight of all tokens, or of each [C], beside values [C, V]."""
    return weight if isinstance(weight, float | int) else weight[:, None]


def _of(given, which: int):
    """One teacher's part of what is a tuple where there are several."""
    return given[which] if isinstance(given, tuple) else given


def own_name(name: str, teacher: str) -> str:
    """The name of one teacher's metric, where there are several."""
    return f'{name}/{teacher}'


def name_of(divergence: Divergence) -> str:
    """The name of a divergence among metrics."""
    return 'kl' if divergence.name == 'forward_kl' else divergence.name


def distillation(
    *terms: tuple[float, Divergence],
    alpha: float = 1.0,
    temperature: float = 1.0,
    squared: bool = True,
    teachers: tuple[Teacher, ...] = (Teacher(),),
    form: str | None = None,
) -> TokenLoss:
    """alpha * T^2 * sum of weight * divergence (both sides at temperature T) + (1 - alpha) * cross-entropy.

    With one forward KL that is Hinton et al. 2015. Reads args['targets'] (int32 [N]), and of the teacher
    args['teacher_hidden'] ([N, E]) and shared['teacher_kernel'] ([V, E], padded as the student's; beside it
    shared['teacher_bias'], [V], where there is one), whose logits are made chunk by chunk, or args['teacher_logits'] of
    the columns that are here (after any soft cap), or args['sparse_target'], a SparseTarget at this temperature. Of
    several teachers these are tuples; a divergence is then its mean over them, or weighed for every token by
    args['share'] ([N, teachers]). args['mixture'] ([N, terms + 1]), where it is given, has the weights alpha * weight
    of every divergence and 1 - alpha, for every token.

    Reports 'loss', 'ce' (at 1), every divergence (at T, unweighted; 'kl' is the forward one) and what each contributes
    to the loss ('kl_weighted', 'ce_weighted'), 'agreement' (teacher and student share a largest logit), 'accuracy',
    'entropy' of the student and 'teacher_entropy' (nats, at T; of a sparse target with the others as one word), of a
    sparse target 'tail' and 'student_tail', the mass outside of its words, and of several teachers their 'share' of the
    tokens and every divergence times it.

    Args:
      terms: (weight, divergence); none stands for the forward KL.
      squared: whether T^2 is there, which keeps the size of gradients as T grows.
      teachers: those by whose logits the student learns.
      form: None for a teacher by its logits; else what becomes of the words that a sparse target leaves out, see
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
    if form in ('truncated', 'renormalized') and escaping:
        raise ValueError(
            f"distillation: {escaping[0]} with form='{form}' (config.distill.form): the student may leave the "
            "teacher's words at no cost or at a gain, and nothing draws it back: expected form='tail'"
        )
    return Distillation(terms, float(alpha), temperature, squared, teachers, form)
