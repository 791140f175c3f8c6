"""Losses on logits and hidden states against their definitions, differentiated by JAX in float64; what they ignore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpt.distill.losses import (
    cosine_distance,
    divergence,
    label_cross_entropy,
    mean_squared_error,
    sampled_forward_kl,
    sampled_reverse_kl,
    smooth_l1,
)
from jpt.kernels.divergences import Divergence
from jpt.kernels.sparse_target import SparseTarget

B, T, V, D, J = 2, 5, 19, 7, 4
WEIGHTS = np.array([[1.0, 0.5, 0, 2.0, 1.0], [0, 0.25, 1.0, 0, 3.0]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(2, B, T, *shape))


def spoiled(x, value=np.nan):
    """The array with garbage wherever a token does not count."""
    return np.where(np.reshape(WEIGHTS == 0, (B, T) + (1,) * (x.ndim - 2)), value, x)


def both(ours, theirs, *arrays):
    """(value, gradient in the first array) of two functions of clean arrays, and of the first one of spoiled arrays."""

    @jax.jit
    def run(*arrays):
        return jax.value_and_grad(lambda x: ours(x, *arrays[1:])[0])(arrays[0])

    clean = run(*arrays)
    dirty = run(*(jax.tree.map(lambda x: spoiled(x, 10**6 if x.dtype.kind == 'i' else np.nan), x) for x in arrays))
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    wanted = jax.jit(jax.value_and_grad(theirs))(jnp.asarray(arrays[0]))
    np.testing.assert_allclose(clean[0], wanted[0], rtol=1e-11)
    np.testing.assert_allclose(clean[1], wanted[1], atol=1e-12)
    assert not np.asarray(clean[1])[WEIGHTS == 0].any()


@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_forward_kl_of_logits(temperature):
    student, teacher = draw(V)

    def theirs(student):
        p, q = jax.nn.softmax(teacher / temperature), jax.nn.log_softmax(student / temperature)
        return temperature**2 * jnp.sum(WEIGHTS * jnp.sum(p * (jnp.log(p) - q), axis=-1))

    both(lambda s, t: divergence(s, t, WEIGHTS, temperature=temperature), theirs, student, teacher)


def test_a_sparse_teacher_is_a_distribution_on_its_words_and_the_rest():
    student, teacher = draw(V, seed=1)
    logp = np.asarray(jax.nn.log_softmax(teacher))
    ids = np.argsort(-teacher, axis=-1)[..., :J].astype(np.int32)
    target = SparseTarget(ids, np.take_along_axis(logp, ids, axis=-1))

    def theirs(student):
        p, q = (jnp.take_along_axis(x, jnp.asarray(ids), axis=-1) for x in (jnp.exp(logp), jax.nn.softmax(student)))
        p, q = (jnp.concatenate([x, 1 - jnp.sum(x, axis=-1, keepdims=True)], axis=-1) for x in (p, q))
        return jnp.sum(WEIGHTS * jnp.sum(q * (jnp.log(q) - jnp.log(p)), axis=-1))

    both(lambda s, t: divergence(s, t, WEIGHTS, Divergence('reverse_kl')), theirs, student, target)


def test_cross_entropy_on_labels():
    student, _ = draw(V, seed=2)
    targets = np.random.default_rng(3).integers(0, V, (B, T)).astype(np.int32)

    def theirs(student):
        logp = jax.nn.log_softmax(student)
        return -jnp.sum(WEIGHTS * jnp.take_along_axis(logp, jnp.asarray(targets)[..., None], axis=-1)[..., 0])

    both(lambda s, t: label_cross_entropy(s, t, WEIGHTS), theirs, student, targets)


def test_distances_of_hidden_states():
    student, teacher = draw(D, seed=4)

    def cosine(s):
        norms = jnp.sqrt(jnp.sum(s**2, axis=-1)) * np.sqrt(np.sum(teacher**2, axis=-1))
        return jnp.sum(WEIGHTS * (1 - jnp.sum(s * teacher, axis=-1) / norms))

    def huber(s):
        apart = jnp.abs(s - teacher)
        each = jnp.where(apart < 0.7, apart**2 / 1.4, apart - 0.35)
        return jnp.sum(WEIGHTS * jnp.sum(each, axis=-1)) / D

    both(lambda s, t: cosine_distance(s, t, WEIGHTS), cosine, student, teacher)
    both(lambda s, t: smooth_l1(s, t, WEIGHTS, beta=0.7), huber, student, teacher)
    both(
        lambda s, t: mean_squared_error(s, t, WEIGHTS),
        lambda s: jnp.sum(WEIGHTS * jnp.sum((s - teacher) ** 2, axis=-1)) / D,
        student,
        teacher,
    )


def test_counts_are_the_weights_and_a_mean_of_nothing_is_left_to_the_caller():
    student, teacher = draw(V, seed=5)
    for weights in (WEIGHTS, 0 * WEIGHTS):
        for total, count in (
            divergence(student, teacher, weights),
            mean_squared_error(student, teacher, weights),
            cosine_distance(student, teacher, weights),
        ):
            assert float(count) == weights.sum()
            assert np.isfinite(float(total))
            assert (float(total) == 0) == (weights.sum() == 0)


def test_a_vector_of_zeros_has_a_cosine_and_a_gradient():
    """As far as can be from any direction: 1; its norm counts as 1e-8."""
    student, teacher, weights = np.zeros((1, D)), np.ones((1, D)), np.ones(1)
    value, gradient = jax.value_and_grad(lambda s: cosine_distance(s, teacher, weights)[0])(student)
    assert float(value) == 1
    np.testing.assert_allclose(gradient, -teacher / np.sqrt(D) * 1e8, rtol=1e-9)
    with pytest.raises(ValueError, match=r'beta=0\.0: expected a positive number'):
        smooth_l1(student, teacher, weights, beta=0.0)


def test_bfloat16_is_summed_in_float32():
    student, teacher = (x.astype(jnp.bfloat16) for x in map(jnp.asarray, draw(V, seed=6)))
    total, count = divergence(student, teacher, jnp.asarray(WEIGHTS, jnp.float32))
    assert total.dtype == count.dtype == jnp.float32
    wide = divergence(student.astype(jnp.float64), teacher.astype(jnp.float64), jnp.asarray(WEIGHTS))[0]
    assert float(total) == pytest.approx(float(wide), rel=1e-5)
    gradient = jax.grad(lambda s: divergence(s, teacher, jnp.asarray(WEIGHTS, jnp.float32))[0])(student)
    assert gradient.dtype == jnp.bfloat16


def enumerated(loss, drawn_by):
    """(value, gradient in the student's logits) in expectation over a word: every word, weighed by who draws it.

    Beside them both distributions [V]. The weights are numbers: drawing is not differentiated.
    """
    logits, teacher = draw(V, seed=7)[:, 0, 0]
    p, q = (np.exp(x) / np.exp(x).sum() for x in (teacher, logits))
    weights = {'teacher': p, 'student': q}[drawn_by]
    run = jax.value_and_grad(lambda z: loss(jax.nn.log_softmax(z), jnp.log(p), weights)[0])
    return *run(jnp.asarray(logits)), p, q


def test_words_that_the_teacher_drew_give_the_forward_kl_and_its_gradient():
    value, gradient, p, q = enumerated(sampled_forward_kl, 'teacher')
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q)), rtol=1e-12)
    np.testing.assert_allclose(gradient, q - p, atol=1e-14)


def test_words_that_the_student_drew_give_the_gradient_by_k2_and_the_value_by_k3():
    def reverse(p, q):
        return np.sum(q * np.log(q / p))

    value, gradient, p, q = enumerated(lambda *given: sampled_reverse_kl(*given), 'student')
    np.testing.assert_allclose(gradient, q * (np.log(q / p) - reverse(p, q)), atol=1e-14)
    np.testing.assert_allclose(value, np.sum(q * np.log(q / p) ** 2) / 2, rtol=1e-12)
    assert abs(value / reverse(p, q) - 1) > 0.1
    value, gradient, p, q = enumerated(lambda *given: sampled_reverse_kl(*given, estimator='k3'), 'student')
    np.testing.assert_allclose(value, reverse(p, q), rtol=1e-12)
    np.testing.assert_allclose(gradient, q - p, atol=1e-14)  # of the forward KL
    _, gradient, _, _ = enumerated(lambda s, t, w: (jnp.sum(w * (s - t)), None), 'student')
    np.testing.assert_allclose(gradient, np.zeros(V), atol=1e-15)  # k1: none


def test_an_estimator_without_a_gradient_is_no_loss():
    for estimator, message in (
        ('k1', r"estimator='k1': its gradient is 0 in expectation.*expected k2 as a loss, or k3 as a measure"),
        ('k4', r"estimator='k4': expected one of k2, k3"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled_reverse_kl(jnp.zeros(3), jnp.zeros(3), jnp.ones(3), estimator=estimator)


@pytest.mark.parametrize('loss', [sampled_forward_kl, sampled_reverse_kl])
def test_drawn_words_without_weight_may_hold_anything(loss):
    student, teacher = -np.abs(draw(seed=8))
    run = jax.value_and_grad(lambda s, t: loss(s, t, WEIGHTS)[0])
    clean, dirty = run(student, teacher), run(spoiled(student), spoiled(teacher, np.inf))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert float(loss(student, teacher, WEIGHTS)[1]) == WEIGHTS.sum()
    narrow = loss(*(jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)), jnp.asarray(WEIGHTS, jnp.float32))
    assert narrow[0].dtype == narrow[1].dtype == jnp.float32
