"""A teacher with other words at other positions: the loss and its gradients against dense float64, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jpt.kernels.aligned_loss import align_target, aligned_distillation
from jpt.kernels.distillation_loss import distillation
from jpt.kernels.divergences import Divergence
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.likely_words import likely_words

B, T, U, D, E, V, W = 2, 7, 5, 6, 4, 31, 23  # W words of the teacher
RANDOM = np.random.default_rng(3)
HIDDEN, TEACHER = RANDOM.normal(size=(B, T, D)), RANDOM.normal(size=(B, U, E))
KERNEL, TEACHER_KERNEL = RANDOM.normal(size=(V, D)), RANDOM.normal(size=(W, E))
WEIGHTS = RANDOM.random((B, T)) * (RANDOM.random((B, T)) > 0.2)
TARGETS = RANDOM.integers(0, V, (B, T)).astype(np.int32)
AT = np.array([[0, -1, 1, 3, -1, 4, -1], [-1, 0, 1, 2, 3, -1, 4]], np.int32)
# Twelve words are shared, in another order; 19 of the student and 11 of the teacher are not.
TABLE = np.full(W, -1, np.int32)
TABLE[RANDOM.permutation(W)[:12]] = RANDOM.permutation(V)[:12]
LACKING = ~np.isin(np.arange(V), TABLE)
TERMS = (0.7, Divergence('forward_kl')), (0.4, Divergence('jsd', 0.3)), (0.2, Divergence('total_variation'))
CASES = {
    'plain': {'count': 9},
    'warm_mixed': {'count': 9, 'alpha': 0.6, 'temperature': 2.0, 'uld': 0.5, 'chunk': 5},
    'all_words': {'count': W, 'temperature': 0.7, 'pad': 2},
    'without_order': {'count': 6, 'uld': 0.0, 'alpha': 0.5},
    'tensor': {'count': 9, 'alpha': 0.6, 'temperature': 1.5, 'pad': 1, 'mesh': {'tensor': 4}},
    'fsdp_tensor': {'count': W, 'alpha': 0.3, 'pad': 1, 'mesh': {'fsdp': 2, 'tensor': 2}},
}


def filled(name):
    return {'alpha': 1.0, 'temperature': 1.0, 'uld': 1.5, 'chunk': None, 'pad': 0, 'mesh': {}} | CASES[name]


def dense(hidden, kernel, count, alpha, temperature, uld):
    """(loss, metrics) token by token from all logits: buckets written out, probabilities sorted."""
    log = jax.nn.log_softmax
    total, sums = 0.0, dict.fromkeys(('ce', 'kl', 'jsd', 'uld', 'aligned', 'unshared', 'tail', 'agreement'), 0.0)
    for b, t in np.ndindex(B, T):
        weight, logits = WEIGHTS[b, t], kernel @ hidden[b, t]
        ce = -log(logits)[TARGETS[b, t]]
        total += weight * (1 - alpha) * ce
        sums['ce'] += weight * ce
        if AT[b, t] < 0:
            continue
        p = np.asarray(TEACHER_KERNEL @ TEACHER[b, AT[b, t]] / temperature)
        p = np.exp(p - p.max()) / np.exp(p - p.max()).sum()
        q = jnp.exp(log(logits / temperature))
        seen = np.argsort(-p)[:count]
        words = np.array([w for w in seen if TABLE[w] >= 0], int)
        alone = np.array([w for w in seen if TABLE[w] < 0], int)
        ps, qs = (jnp.append(x, 1 - jnp.sum(x)) for x in (p[words], q[TABLE[words]]))
        m = 0.3 * ps + 0.7 * qs

        def kl(a, c):
            return jnp.sum(a * (jnp.log(a) - jnp.log(c)))

        values = {'kl': kl(ps, qs), 'jsd': 0.3 * kl(ps, m) + 0.7 * kl(qs, m), 'tv': jnp.sum(abs(ps - qs)) / 2}
        ranked = [-jnp.sort(-x)[:count] for x in (p[alone], q[LACKING])]
        ours = [jnp.pad(x, (0, count - len(x))) for x in ranked]
        values['uld'] = jnp.sum(abs(ours[0] - ours[1]))
        factors = {'kl': 0.7, 'jsd': 0.4, 'tv': 0.2, 'uld': uld}
        total += weight * alpha * temperature**2 * sum(factors[name] * values[name] for name in factors)
        values |= {'aligned': 1, 'unshared': p[alone].sum(), 'tail': 1 - p[words].sum()}
        values['agreement'] = TABLE[p.argmax()] == jnp.argmax(q)
        for name in ('kl', 'jsd', 'uld', 'aligned', 'unshared', 'tail', 'agreement'):
            sums[name] += weight * values[name]
    return total, sums


@functools.cache
def results(mesh):
    """{name: ((total, sums), gradients)} of the cases of a mesh (as sorted items), from one program."""
    names = [name for name in CASES if tuple(sorted(filled(name)['mesh'].items())) == mesh]

    def one(options, hidden, kernel, teacher_hidden, teacher_kernel):
        teacher_kernel = jnp.pad(teacher_kernel, ((0, -W % 4), (0, 0)), constant_values=50.0)
        found = likely_words(
            *(teacher_hidden, teacher_kernel, np.zeros((B, U), np.int32)),
            count=options['count'],
            vocab_size=W,
            temperature=options['temperature'],
        )
        target = align_target(found.target, AT, TABLE)
        parts = distillation(*TERMS, alpha=options['alpha'], temperature=options['temperature'], form='tail')
        loss = aligned_distillation(parts, uld=options['uld'])
        rows, args = (0, options['pad']), {'targets': TARGETS, 'aligned_target': target}
        shared = {'lacking': np.pad(LACKING, rows, constant_values=True)[:, None]}
        kernel = jnp.pad(kernel, (rows, (0, 0)), constant_values=100.0)  # garbage that takes no part
        more = {'shared': shared, 'vocab_size': V, 'chunk': options['chunk']}
        return linear_loss(hidden, kernel, WEIGHTS, args, loss, **more)

    @jax.jit
    def run(*operands):
        graded = {n: jax.value_and_grad(functools.partial(one, filled(n)), (0, 1), has_aux=True) for n in names}
        return {name: graded[name](*operands) for name in names}

    operands = HIDDEN, KERNEL, TEACHER, TEACHER_KERNEL
    sizes = dict(mesh)
    with jax.enable_x64(True):
        if not sizes:
            return jax.tree.map(np.asarray, run(*operands))
        axes = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        with jax.set_mesh(axes):
            return jax.tree.map(np.asarray, run(*operands))


@pytest.mark.parametrize('name', CASES)
def test_loss_gradients_and_metrics_equal_dense_float64(name):
    options = filled(name)
    (total, sums), gradients = results(tuple(sorted(options['mesh'].items())))[name]
    plain = functools.partial(dense, **{k: options[k] for k in ('count', 'alpha', 'temperature', 'uld')})
    with jax.enable_x64(True):
        reference = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(HIDDEN, KERNEL)
        (expected, parts), slopes = jax.tree.map(np.asarray, reference)
    np.testing.assert_allclose(total, expected, rtol=1e-10)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert np.linalg.norm(gradient - slope) < 1e-10 * np.linalg.norm(slope)
    for metric in set(parts) & set(sums):
        np.testing.assert_allclose(sums[metric][0], parts[metric], rtol=1e-9, atol=1e-12, err_msg=metric)
    assert 'uld' in sums or not options['uld']
