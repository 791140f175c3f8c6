"""Token losses in closed form, on a vocabulary of five words of which the last is padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.kernels.distillation_loss import Teacher, distillation
from jpt.kernels.divergences import Divergence
from jpt.kernels.sparse_target import SparseTarget
from jpt.kernels.token_losses import cross_entropy
from jpt.kernels.vocab_shard import PADDED, VocabShard

VOCAB = VocabShard(axes=('tensor',), size=5, vocab_size=4)
TARGETS = np.array([2, 0, 3], np.int32)


@pytest.fixture(scope='module')
def results():
    """Everything that is looked at below, in one program: uniform logits, and probabilities that one can count."""
    uniform = np.zeros((3, 5))
    student = np.log([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    teacher = np.log([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    student, teacher = (np.pad(x, [(0, 0), (0, 1)], constant_values=7.0) for x in (student, teacher))

    @jax.jit
    def run(uniform, student, teacher):
        args = {'targets': TARGETS, 'teacher_hidden': teacher}
        shared = {'teacher_kernel': np.eye(5)}
        return {
            'uniform': cross_entropy()(VOCAB.mask(uniform), args, None, VOCAB),
            'z': cross_entropy(z_loss=0.5)(VOCAB.mask(uniform), args, None, VOCAB),
            'student': cross_entropy()(VOCAB.mask(student), args, None, VOCAB),
            'kl': distillation()(VOCAB.mask(student), args, shared, VOCAB),
            'mixed': distillation(alpha=0.25)(VOCAB.mask(student), args, shared, VOCAB),
            'masked': VOCAB.mask(uniform),
            'picked': VOCAB.pick(uniform + np.arange(5.0)[None], TARGETS),
            'hits': VOCAB.hits(TARGETS),
        }

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(uniform, student, teacher))


def test_columns_of_a_shard(results):
    np.testing.assert_array_equal(results['masked'], [[0, 0, 0, 0, PADDED]] * 3)
    np.testing.assert_array_equal(results['picked'], TARGETS)
    np.testing.assert_array_equal(results['hits'], np.eye(5, dtype=bool)[TARGETS])
    assert VOCAB.padded
    assert not VocabShard(('tensor',), 5, 5).padded


def test_uniform_logits_cost_the_log_of_the_vocabulary(results):
    loss, dlogits, metrics = results['uniform']
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-15)
    expected = np.full((3, 5), 0.25)
    expected[:, 4] = 0
    expected[np.arange(3), TARGETS] -= 1
    np.testing.assert_allclose(dlogits, expected, atol=1e-16)
    np.testing.assert_array_equal(metrics['accuracy'], 1)  # every logit is a largest one


def test_z_loss_adds_the_square_of_the_normalizer(results):
    loss, dlogits, metrics = results['z']
    np.testing.assert_allclose(loss, np.log(4) + 0.5 * np.log(4) ** 2, rtol=1e-15)
    np.testing.assert_allclose(metrics['ce'], np.log(4), rtol=1e-15)
    # d(0.5 lse^2) = lse * softmax, on top of softmax - one hot.
    slope = 0.25 * (1 + np.log(4))
    np.testing.assert_allclose(dlogits[0], [slope, slope, slope - 1, slope, 0], rtol=1e-14)


def test_cross_entropy_of_counted_probabilities(results):
    loss, _, metrics = results['student']
    np.testing.assert_allclose(loss, np.log([8, 4, 2.5]), rtol=1e-12)
    np.testing.assert_array_equal(metrics['accuracy'], [0, 1, 1])


def test_divergence_of_counted_probabilities(results):
    # KL(uniform || 1/2 1/4 1/8 1/8) = 1/4 (log 1/2 + 0 + log 2 + log 2); the other way (1/2 + 0 - 1/8 - 1/8) log 2.
    expected = [0.25 * np.log(2), 0.25 * np.log(2), 0]
    np.testing.assert_allclose(results['kl'][0], expected, atol=1e-14)
    np.testing.assert_allclose(results['kl'][1][0], [0.25, 0, -0.125, -0.125, 0], atol=1e-14)
    np.testing.assert_allclose(results['kl'][1][2], 0, atol=1e-14)
    metrics = results['kl'][2]
    np.testing.assert_allclose(metrics['kl'], expected, atol=1e-14)
    np.testing.assert_allclose(metrics['ce'], np.log([8, 4, 2.5]), rtol=1e-12)
    np.testing.assert_array_equal(metrics['agreement'], [1, 1, 1])  # where all are equal, one of them is shared


def test_mixture_of_divergence_and_cross_entropy(results):
    loss, dlogits, metrics = results['mixed']
    np.testing.assert_allclose(loss, 0.25 * metrics['kl'] + 0.75 * metrics['ce'], rtol=1e-14)
    kl, ce = results['kl'][1], results['student'][1]
    np.testing.assert_allclose(dlogits, 0.25 * kl + 0.75 * ce, atol=1e-15)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
def test_only_words_of_both_vocabularies_are_compared(temperature):
    """A teacher of five words and a student of eight: as if the student had five, dense and from likely words."""
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(3, 8)), random.normal(size=(3, 5))
    logp = teacher / temperature - np.log(np.exp(teacher / temperature).sum(axis=-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1)[:, :2].astype(np.int32)
    words = SparseTarget(ids, np.take_along_axis(logp, ids, axis=-1))
    terms = ((0.7, Divergence()), (0.3, Divergence('reverse_kl')))

    @jax.jit
    def run(student, teacher, words):
        found = {}
        for form in (None, 'tail'):
            for size in (8, 5):
                loss = distillation(*terms, temperature=temperature, teachers=(Teacher(5),), form=form)
                logits = jnp.pad(teacher, [(0, 0), (0, size - 5)], constant_values=9.0)
                args = {'targets': TARGETS, 'teacher_logits': logits, 'sparse_target': words}
                found[f'{form} {size}'] = loss(student[:, :size], args, None, VocabShard((), size, size))
        return found

    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, run(student, teacher, words))
    for form in (None, 'tail'):
        (value, slope, metrics), (wanted, wanted_slope, wanted_metrics) = found[f'{form} 8'], found[f'{form} 5']
        np.testing.assert_allclose(value, wanted, rtol=1e-13)
        np.testing.assert_allclose(slope, np.pad(wanted_slope, [(0, 0), (0, 3)]), atol=1e-14)
        for name in ('kl', 'reverse_kl', 'entropy', 'teacher_entropy', 'agreement'):
            np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-13, err_msg=name)
        assert (metrics['ce'] > wanted_metrics['ce']).all(), 'labels are predicted among all words'
