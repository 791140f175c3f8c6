"""Head losses and their gradients in float64 numpy, over all logits at once: what the fused loss is held to."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Hidden states [N, D], heads [V, D] without padding, teacher's likewise; weights and targets [N]."""

    hidden: np.ndarray
    kernel: np.ndarray
    weights: np.ndarray
    targets: np.ndarray
    teacher_hidden: np.ndarray
    teacher_kernel: np.ndarray


def draw(seed=0, N=22, D=6, E=5, V=31):
    rng = np.random.default_rng(seed)
    weights = rng.random(N) * (rng.random(N) > 0.3)
    return Case(
        rng.standard_normal((N, D)),
        rng.standard_normal((V, D)),
        weights / weights.sum(),
        rng.integers(0, V, N, dtype=np.int32),
        rng.standard_normal((N, E)),
        rng.standard_normal((V, E)),
    )


def log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def capped_logits(hidden, kernel, cap):
    """Logits and the slope of the soft cap."""
    raw = hidden @ kernel.T
    if cap is None:
        return raw, np.ones_like(raw)
    return cap * np.tanh(raw / cap), 1 / np.cosh(raw / cap) ** 2


def _reduced(case, per_token, dlogits, slope):
    """(total, {name: weighted sum}, (dhidden, dkernel)) from per-token values and the gradient of the loss."""
    dlogits = case.weights[:, None] * dlogits * slope
    sums = {name: (case.weights * value).sum() for name, value in per_token.items()}
    return sums['loss'], sums, (dlogits @ case.kernel, dlogits.T @ case.hidden)


def cross_entropy(case, soft_cap=None, z_loss=0.0):
    logits, slope = capped_logits(case.hidden, case.kernel, soft_cap)
    logp = log_softmax(logits)
    picked = np.arange(len(case.targets)), case.targets
    lse = logits[picked] - logp[picked]
    ce = -logp[picked]
    dlogits = np.exp(logp) * (1 + 2 * z_loss * lse)[:, None]
    dlogits[picked] -= 1
    per_token = {'loss': ce + z_loss * lse**2, 'ce': ce, 'accuracy': logits.argmax(axis=-1) == case.targets}
    return _reduced(case, per_token, dlogits, slope)


def distillation(case, alpha, temperature, soft_cap=None, teacher_cap=None):
    logits, slope = capped_logits(case.hidden, case.kernel, soft_cap)
    teacher, _ = capped_logits(case.teacher_hidden, case.teacher_kernel, teacher_cap)
    logq, logp = log_softmax(teacher / temperature), log_softmax(logits / temperature)
    picked = np.arange(len(case.targets)), case.targets
    plain = log_softmax(logits)
    kl, ce = (np.exp(logq) * (logq - logp)).sum(axis=-1), -plain[picked]
    dce = np.exp(plain)
    dce[picked] -= 1
    dlogits = alpha * temperature * (np.exp(logp) - np.exp(logq)) + (1 - alpha) * dce
    per_token = {
        'loss': alpha * temperature**2 * kl + (1 - alpha) * ce,
        'kl': kl,
        'ce': ce,
        'kl_weighted': alpha * temperature**2 * kl,
        'ce_weighted': (1 - alpha) * ce,
        'entropy': -(np.exp(logp) * logp).sum(axis=-1),
        'teacher_entropy': -(np.exp(logq) * logq).sum(axis=-1),
        'agreement': logits.argmax(axis=-1) == teacher.argmax(axis=-1),
        'accuracy': logits.argmax(axis=-1) == case.targets,
    }
    return _reduced(case, per_token, dlogits, slope)
