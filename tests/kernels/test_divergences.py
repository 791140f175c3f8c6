"""Divergences against their definitions in probabilities, differentiated by JAX, in float64: dense and by buckets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.divergences import NAMES, Divergence
from jpt.kernels.sparse_target import FORMS, SparseTarget, sparse_divergence
from jpt.kernels.vocab_shard import VocabShard

N, V, J = 5, 24, 6
KINDS = {
    'forward_kl': Divergence(),
    'reverse_kl': Divergence('reverse_kl'),
    'total_variation': Divergence('total_variation'),
    'jsd': Divergence('jsd', beta=0.3),
    'jsd-normalized': Divergence('jsd', beta=0.8, normalized=True),
    'jsd-first-end': Divergence('jsd', beta=0.0, normalized=True),
    'jsd-last-end': Divergence('jsd', beta=1.0, normalized=True),
    'skew_kl': Divergence('skew_kl', skew=0.2),
    'skew_kl-plain': Divergence('skew_kl', skew=0.0),
    'skew_reverse_kl': Divergence('skew_reverse_kl', skew=0.4),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def kl(p, q):
    """Sum over words where there is any mass."""
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - jnp.log(q)), 0), axis=-1)


def literal(kind, p, q):
    """The divergence of two arrays of probabilities (or of parts of them), as its paper writes it."""
    d = KINDS[kind]
    m = d.beta * p + (1 - d.beta) * q
    jsd = d.beta * kl(p, m) + (1 - d.beta) * kl(q, m)
    return {
        'forward_kl': lambda: kl(p, q),
        'reverse_kl': lambda: kl(q, p),
        'total_variation': lambda: jnp.sum(jnp.abs(p - q), axis=-1) / 2,
        'jsd': lambda: jsd,
        'jsd-normalized': lambda: jsd / (d.beta * (1 - d.beta)),
        'jsd-first-end': lambda: kl(p, q),
        'jsd-last-end': lambda: kl(q, p),
        'skew_kl': lambda: kl(p, d.skew * p + (1 - d.skew) * q),
        'skew_kl-plain': lambda: kl(p, q),
        'skew_reverse_kl': lambda: kl(q, d.skew * q + (1 - d.skew) * p),
    }[kind]()


@functools.cache
def draw(seed=0):
    """Logits of a teacher and of a student [N, V], and the ids of the teacher's J likeliest words."""
    random = np.random.default_rng(seed)
    teacher, student = 2 * random.normal(size=(2, N, V))
    return teacher, student, np.argsort(-teacher, axis=-1)[:, :J].astype(np.int32)


def wanted(kind, form, ids, teacher, student):
    """(values, gradient in the student's logits) of the sum, by JAX: of whole distributions where `form` is None."""

    def value(student):
        p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
        if form is not None:
            p, q = (jnp.take_along_axis(x, ids, axis=-1) for x in (p, q))
        if form == 'tail':
            p, q = (jnp.concatenate([x, 1 - jnp.sum(x, axis=-1, keepdims=True)], axis=-1) for x in (p, q))
        if form == 'renormalized':
            p, q = (x / jnp.sum(x, axis=-1, keepdims=True) for x in (p, q))
        values = literal(kind, p, q)
        return jnp.sum(values), values

    gradient, values = jax.grad(value, has_aux=True)(student)
    return values, gradient


@pytest.mark.parametrize('kind', KINDS)
def test_values_and_gradients_are_those_of_the_definition(kind):
    teacher, student, _ = draw()

    @jax.jit
    def both(teacher, student):
        p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        terms, slopes = KINDS[kind](p, q)
        gradient = slopes - jnp.exp(q) * jnp.sum(slopes, axis=-1, keepdims=True)
        return (jnp.sum(terms, axis=-1), gradient), wanted(kind, None, None, teacher, student)

    ours, theirs = both(teacher, student)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-11)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-12)
    assert float(jnp.min(ours[0])) > 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_buckets_are_those_of_the_coarse_grained_distributions(kind):
    """Every form; the bucket's gradient reaches each word outside in proportion to its probability."""
    teacher, student, ids = draw(1)
    logp = jax.nn.log_softmax(teacher)
    target = SparseTarget(jnp.asarray(ids), jnp.take_along_axis(logp, ids, axis=-1))

    @jax.jit
    def both(student, target):
        vocab = VocabShard((), V, V)
        found = {
            form: sparse_divergence(KINDS[kind], form, target, jax.nn.log_softmax(student), vocab) for form in FORMS
        }
        return found, {form: wanted(kind, form, ids, teacher, student) for form in FORMS}

    found, theirs = both(student, target)
    for form in FORMS:
        value, gradient, (tail, student_tail) = found[form]
        np.testing.assert_allclose(value, theirs[form][0], rtol=1e-10, atol=1e-13, err_msg=form)
        np.testing.assert_allclose(gradient, theirs[form][1], atol=1e-12, err_msg=form)
        for log_mass, logits in ((tail, teacher), (student_tail, student)):
            inside = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), ids, axis=-1).sum(axis=-1)
            np.testing.assert_allclose(np.exp(log_mass), 1 - inside, rtol=1e-9)


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    """But for the truncated sums, whose fixed point is another: all of the mass on the words."""
    _, student, _ = draw(2)
    logq = jax.nn.log_softmax(student)
    ids = jnp.argsort(-logq, axis=-1)[:, :J].astype(jnp.int32)
    target = SparseTarget(ids, jnp.take_along_axis(logq, ids, axis=-1))

    @jax.jit
    def run(target, logq):
        sparse = {
            (kind, form): sparse_divergence(divergence, form, target, logq, VocabShard((), V, V))[:2]
            for kind, divergence in KINDS.items()
            for form in ('tail', 'renormalized')
        }
        dense = {kind: divergence(logq, logq)[0].sum(axis=-1) for kind, divergence in KINDS.items()}
        return sparse, dense

    sparse, dense = run(target, logq)
    for case, (value, gradient) in sparse.items():
        np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=str(case))
        if case[0] != 'total_variation':
            np.testing.assert_allclose(gradient, 0, atol=1e-12, err_msg=str(case))
    for kind, value in dense.items():
        np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=kind)
    pulled = sparse_divergence(Divergence(), 'truncated', target, logq, VocabShard((), V, V))[1]
    assert float(jnp.min(jnp.take_along_axis(pulled, ids, axis=-1).max(axis=-1))) < 0


def test_a_tail_that_is_known_is_not_made_larger():
    """Of a teacher that is almost sure: 1e-20 outside of its words, known by its logarithm."""
    logits = jnp.zeros((1, V)).at[0, 3].set(46.0).at[0, 5].set(45.0)
    logp = jax.nn.log_softmax(logits)
    ids = jnp.array([[3, 5]], jnp.int32)
    outside = jnp.delete(logp, np.array([3, 5]), axis=-1, assume_unique_indices=True)
    target = SparseTarget(ids, jnp.take_along_axis(logp, ids, axis=-1), jax.nn.logsumexp(outside, axis=-1))
    for kind in ('forward_kl', 'reverse_kl'):
        value, gradient, _ = sparse_divergence(Divergence(kind), 'tail', target, logp, VocabShard((), V, V))
        np.testing.assert_allclose(value, 0, atol=1e-12, err_msg=kind)
        np.testing.assert_allclose(gradient, 0, atol=1e-12, err_msg=kind)


@pytest.mark.parametrize('form', FORMS)
def test_a_vocabulary_over_shards_is_that_of_one_device(form):
    """Four shards of six words each and two that are padding; every id of some token lies in another shard."""
    teacher, student, ids = draw(3)
    ids = ids.copy()
    ids[0] = np.arange(18, 24)  # all in the last shard
    ids[1, 3:] = -1  # fewer words
    ids[2, 0] = V + 5  # no word
    logp = np.asarray(jax.nn.log_softmax(teacher))
    target = SparseTarget(jnp.asarray(ids), jnp.take_along_axis(jnp.asarray(logp), jnp.clip(ids, 0, V - 1), axis=-1))
    whole = VocabShard((), V, V)
    mesh = jax.make_mesh((4,), ('tensor',), axis_types=(AxisType.Auto,))
    padded = np.pad(np.asarray(jax.nn.log_softmax(student)), [(0, 0), (0, 4)], constant_values=-1e30)

    def shard(target, q):
        vocab = VocabShard(('tensor',), 7, V)
        return {name: sparse_divergence(KINDS[name], form, target, q, vocab) for name in KINDS}

    specs = P(None, 'tensor')
    out = {name: (P(), specs, (P(), P())) for name in KINDS}
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=(P(), specs), out_specs=out, check_vma=False)
    found = jax.jit(mapped)(target, padded)
    plain = jax.jit(lambda target, q: {name: sparse_divergence(KINDS[name], form, target, q, whole) for name in KINDS})(
        target, jax.nn.log_softmax(student)
    )
    for name in KINDS:
        (value, gradient, tails), theirs = found[name], plain[name]
        np.testing.assert_allclose(value, theirs[0], rtol=1e-12, atol=1e-14, err_msg=name)
        np.testing.assert_allclose(gradient[:, :V], theirs[1], atol=1e-13, err_msg=name)
        assert not np.asarray(gradient[:, V:]).any()
        np.testing.assert_allclose(tails, theirs[2], rtol=1e-12)
        assert np.isfinite(np.asarray(value)).all()


def test_the_ends_of_jsd_are_limits():
    """Divided by beta (1 - beta) it goes to the two KLs; without, to 0."""
    teacher, student, _ = draw(4)
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)

    def value(**numbers):
        return np.asarray(Divergence('jsd', **numbers)(p, q)[0].sum(axis=-1))

    for beta, end in ((1e-7, 0.0), (1 - 1e-7, 1.0)):
        near = value(beta=beta, normalized=True)
        np.testing.assert_allclose(near, value(beta=end, normalized=True), rtol=1e-4)
        assert np.all(value(beta=beta) < 1e-5)


def test_words_without_mass_cost_what_the_limit_is():
    """0 log 0 is 0 on either side."""
    p, q = jnp.log(jnp.asarray([[0.5, 0.5, 0.0]])), jnp.log(jnp.asarray([[0.25, 0.5, 0.25]]))
    for kind in ('forward_kl', 'jsd', 'skew_kl', 'skew_reverse_kl', 'total_variation'):
        terms, slopes = KINDS[kind](p, q)
        assert np.isfinite(np.asarray(terms)).all(), kind
        assert np.isfinite(np.asarray(slopes)).all(), kind
        terms, slopes = KINDS[kind](q, p)
        if kind != 'forward_kl':
            assert np.isfinite(np.asarray(terms)).all(), kind
            assert np.isfinite(np.asarray(slopes)).all(), kind
    np.testing.assert_allclose(KINDS['forward_kl'](p, q)[0].sum(), 0.5 * np.log(2), rtol=1e-12)


@pytest.mark.parametrize(
    ('numbers', 'message'),
    [
        ({'name': 'kl'}, "divergence='kl': expected one of " + ', '.join(NAMES)),
        ({'name': 'jsd', 'beta': 0.0}, r'beta=0\.0: the divergence is 0 there for any student'),
        ({'name': 'jsd', 'beta': 1.5, 'normalized': True}, r'beta=1\.5: expected a number from 0 to 1'),
        ({'name': 'skew_kl', 'skew': 1.0}, r'skew=1\.0: expected a number from 0 to below 1'),
    ],
)
def test_numbers_that_mean_nothing_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**numbers)
