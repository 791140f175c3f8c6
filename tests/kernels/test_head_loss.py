"""The fused head loss against float64 numpy: losses, options, dtypes, chunks and meshes in pairs, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_head_loss as reference
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jpt.kernels.distillation_loss import Teacher, distillation
from jpt.kernels.divergences import Divergence
from jpt.kernels.head_loss import linear_loss
from jpt.kernels.sparse_target import FORMS, SparseTarget
from jpt.kernels.token_losses import cross_entropy

V = 31
TOLERANCE = {'float64': 1e-12, 'float32': 1e-5, 'bfloat16': 2e-2}

# Pairwise: loss and its options, cap of the logits, chunk (whole, ragged, one token), block (one chunk, some, all),
# padded rows, dtype, mesh.
CASES = {
    'ce': {},
    'ce_z_cap_ragged': {'loss': {'z_loss': 0.1}, 'cap': 2.0, 'chunk': 7, 'block': 3, 'pad': 1},
    'ce_tensor': {'chunk': 8, 'pad': 1, 'mesh': {'tensor': 4}},
    'ce_f32_rows': {'cap': 3.0, 'chunk': 4, 'pad': 1, 'dtype': 'float32', 'mesh': {'data': 2, 'tensor': 2}},
    'ce_bf16': {'chunk': 9, 'block': 3, 'dtype': 'bfloat16'},
    'kl': {'loss': {'alpha': 1.0, 'temperature': 1.0}, 'chunk': 22, 'pad': 5},
    'kl_mixed_one_token': {'loss': {'alpha': 0.3, 'temperature': 2.0, 'soft_cap': 1.5}, 'chunk': 1},
    'kl_mixed_tensor': {
        'loss': {'alpha': 0.6, 'temperature': 0.7},
        'cap': 2.0,
        'chunk': 5,
        'pad': 1,
        'mesh': {'pipe': 2, 'fsdp': 2, 'tensor': 2},
    },
    'kl_f32_tensor': {
        'loss': {'alpha': 1.0, 'temperature': 3.0, 'soft_cap': 4.0},
        'chunk': 6,
        'block': 2,
        'pad': 9,
        'dtype': 'float32',
        'mesh': {'tensor': 8},
    },
}


def token_loss(options):
    if 'alpha' not in options:
        return cross_entropy(**options)
    rest = {name: value for name, value in options.items() if name != 'soft_cap'}
    return distillation(**rest, teachers=(Teacher(soft_cap=options.get('soft_cap')),))


def expected(case, options, cap):
    if 'alpha' not in options:
        return reference.cross_entropy(case, cap, **options)
    return reference.distillation(case, options['alpha'], options['temperature'], cap, options.get('soft_cap'))


def differentiated(loss, **options):
    """(hidden, kernel, weights, args, shared) -> ((total, sums), gradients)."""

    def total(hidden, kernel, weights, args, shared):
        return linear_loss(hidden, kernel, weights, args, loss, shared=shared, **options)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)


def operands(case, dtype='float64', pad=0):
    """Arguments of the fused loss; padded rows of the heads hold garbage that must not count."""
    rows = [(0, pad), (0, 0)]
    kernels = (np.pad(x, rows, constant_values=100.0) for x in (case.kernel, case.teacher_kernel))
    hidden, kernel, teacher_hidden, teacher_kernel = (
        x.astype(jnp.dtype(dtype)) for x in (case.hidden, next(kernels), case.teacher_hidden, next(kernels))
    )
    weights = case.weights.astype(np.promote_types(dtype, np.float32) if dtype != 'bfloat16' else np.float32)
    args = {'targets': case.targets, 'teacher_hidden': teacher_hidden}
    return hidden, kernel, weights, args, {'teacher_kernel': teacher_kernel}


def rounded(case, dtype):
    """The case as the program sees it: operands rounded to dtype, then float64 again."""
    return case._replace(
        **{
            name: getattr(case, name).astype(jnp.dtype(dtype)).astype(np.float64)
            for name in ('hidden', 'kernel', 'teacher_hidden', 'teacher_kernel')
        }
    )


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def assert_close(found, wanted, tolerance):
    (total, sums), gradients = found
    expected_total, expected_sums, expected_gradients = wanted
    assert float(total) == pytest.approx(expected_total, rel=tolerance)
    assert set(sums) == set(expected_sums)
    for name, (value, weight) in sums.items():
        assert float(value) == pytest.approx(expected_sums[name], rel=tolerance, abs=tolerance), name
        assert float(weight) == pytest.approx(1, rel=1e-6)
    for name, ours, theirs in zip(('hidden', 'kernel'), gradients, expected_gradients, strict=True):
        ours = np.asarray(ours, np.float64)
        error = np.linalg.norm(ours[: len(theirs)] - theirs) / np.linalg.norm(theirs)
        assert error < tolerance, f'd{name}: relative error {error:.1e} against numpy'
        assert not ours[len(theirs) :].any(), f'd{name}: padded rows must get no gradient'


def filled(name):
    options = {'loss': {}, 'cap': None, 'chunk': None, 'block': None, 'pad': 0, 'dtype': 'float64', 'mesh': {}}
    return options | CASES[name]


@functools.cache
def results(mesh):
    """((total, sums), gradients) of all cases of a mesh (as sorted items), from one program."""
    names = [name for name in CASES if tuple(sorted(filled(name)['mesh'].items())) == mesh]

    @jax.jit
    def run(arrays):
        found = {}
        for name in names:
            options = filled(name)
            loss = token_loss(options['loss'])
            rest = {'soft_cap': options['cap'], 'chunk': options['chunk'], 'block': options['block']}
            found[name] = differentiated(loss, vocab_size=V, **rest)(*arrays[name])
        return found

    arrays = {name: operands(reference.draw(), filled(name)['dtype'], filled(name)['pad']) for name in names}
    with jax.enable_x64(True), jax.set_mesh(mesh_of(filled(names[0])['mesh'])) if mesh else jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(arrays))


@pytest.mark.parametrize('name', CASES)
def test_loss_metrics_and_gradients_equal_numpy(name):
    options = filled(name)
    dtype, found = options['dtype'], results(tuple(sorted(options['mesh'].items())))[name]
    assert [x.dtype for x in found[1]] == [jnp.dtype(dtype)] * 2
    wanted = expected(rounded(reference.draw(), dtype), options['loss'], options['cap'])
    assert_close(found, wanted, TOLERANCE[dtype])


def test_numpy_gradients_are_finite_differences():
    """The yardstick itself."""
    case = reference.draw(1)

    def total(hidden, kernel):
        return reference.distillation(case._replace(hidden=hidden, kernel=kernel), 0.4, 1.7, 2.5, 1.5)[0]

    dhidden, dkernel = reference.distillation(case, 0.4, 1.7, 2.5, 1.5)[2]
    step = np.zeros_like(case.hidden)
    token = int(np.flatnonzero(case.weights)[0])
    step[token, 2] = 1e-6
    slope = (total(case.hidden + step, case.kernel) - total(case.hidden - step, case.kernel)) / 2e-6
    assert dhidden[token, 2] == pytest.approx(slope, rel=1e-6)
    step = np.zeros_like(case.kernel)
    step[4, 1] = 1e-6
    slope = (total(case.hidden, case.kernel + step) - total(case.hidden, case.kernel - step)) / 2e-6
    assert dkernel[4, 1] == pytest.approx(slope, rel=1e-6)


def test_gpt2_vocabulary_over_tensor_inside_a_shard_map_over_data():
    """50,257 words padded to 50,260 over tensor=4; gradients taken inside, summed over data as the step does."""
    case = reference.draw(2, N=12, D=3, E=3, V=50257)
    loss = distillation(alpha=0.5)

    def inside(hidden, kernel, weights, args, shared):
        found = jax.value_and_grad(
            lambda hidden, kernel: linear_loss(
                hidden, kernel, weights, args, loss, shared=shared, vocab_size=50257, chunk=4
            ),
            argnums=(0, 1),
            has_aux=True,
        )(hidden, kernel)
        (total, sums), (dhidden, dkernel) = found
        return jax.lax.psum((total, sums), 'data'), (dhidden, jax.lax.psum(dkernel, 'data'))

    with jax.enable_x64(True), jax.set_mesh(mesh_of({'data': 2, 'tensor': 4})):
        run = jax.shard_map(
            inside,
            in_specs=(P('data'), P(), P('data'), P('data'), P()),
            out_specs=(P(), (P('data'), P())),
            axis_names={'data'},
            check_vma=False,
        )
        found = jax.jit(run)(*operands(case, pad=3))
    assert_close(found, reference.distillation(case, 0.5, 1.0), 1e-12)


def test_pipe_outside_and_rows_of_two_axes():
    """Inside a shard_map over pipe the head's rows are local already; hidden states come as [B, T, D]."""
    case = reference.draw(3)
    hidden, kernel, weights, args, shared = operands(case, pad=1)
    loss = distillation(alpha=0.5)

    def folded(tree):
        return jax.tree.map(lambda x: x.reshape(2, 11, *x.shape[1:]), tree)

    def inside(hidden, kernel, weights, args, shared):
        return jax.value_and_grad(
            lambda hidden, kernel: linear_loss(hidden, kernel, weights, args, loss, shared=shared, vocab_size=V),
            argnums=(0, 1),
            has_aux=True,
        )(hidden, kernel)

    with jax.enable_x64(True), jax.set_mesh(mesh_of({'pipe': 2, 'fsdp': 2, 'tensor': 2})):
        run = jax.shard_map(
            inside,
            in_specs=(P(), P('pipe'), P(), P(), P('pipe')),
            out_specs=(P(), (P(), P('pipe'))),
            axis_names={'pipe'},
            check_vma=False,
        )
        out, (dhidden, dkernel) = jax.jit(run)(folded(hidden), kernel, folded(weights), folded(args), shared)
    found = out, (np.asarray(dhidden).reshape(22, -1), dkernel)
    assert_close(found, reference.distillation(case, 0.5, 1.0), 1e-12)


def test_no_weight_gives_no_loss_and_no_gradient_and_scaling_goes_through():
    """One program: an empty microbatch first, then the same tokens with weights, the result scaled by 3."""
    case = reference.draw()
    hidden, kernel, weights, args, _ = operands(case, 'float32')

    @jax.jit
    def run(weights):
        def total(hidden, kernel):
            return linear_loss(hidden, kernel, weights, args, cross_entropy(), vocab_size=V, chunk=8)[0]

        return linear_loss(hidden, kernel, weights, args, cross_entropy(), vocab_size=V), jax.grad(
            lambda *x: 3 * total(*x), argnums=(0, 1)
        )(hidden, kernel)

    (total, sums), gradients = run(np.zeros_like(weights))
    assert float(total) == 0
    assert all(float(value) == float(weight) == 0 for value, weight in sums.values())
    assert not any(np.asarray(x).any() for x in gradients)
    (total, _), (dhidden, dkernel) = run(weights)
    wanted, _, (expected_dhidden, expected_dkernel) = reference.cross_entropy(rounded(case, 'float32'))
    assert float(total) == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(dhidden, 3 * expected_dhidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(dkernel, 3 * expected_dkernel, rtol=0, atol=1e-6)


def sizes_in(jaxpr):
    """Number of elements of every array in a jaxpr, those inside loops too."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            yield int(np.prod(getattr(var.aval, 'shape', ())))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from sizes_in(inner)


def test_logits_exist_for_one_chunk_at_a_time():
    """Walks the program of loss and gradients over 8,192 tokens and 131,072 words without running it."""
    N, D, words, chunk = 8192, 64, 131072, 256
    shapes = (N, D), (words, D), (N,), (N,), (N, D), (words, D)
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.int32, jnp.bfloat16, jnp.bfloat16)

    def total(hidden, kernel, weights, targets, teacher_hidden, teacher_kernel):
        args, shared = {'targets': targets, 'teacher_hidden': teacher_hidden}, {'teacher_kernel': teacher_kernel}
        loss = distillation(alpha=0.5, temperature=2.0)
        return linear_loss(hidden, kernel, weights, args, loss, shared=shared, vocab_size=words, chunk=chunk)[0]

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(*arrays)
    assert max(sizes_in(jaxpr.jaxpr)) == chunk * words


def test_a_vocabulary_that_does_not_fit_is_refused():
    mesh = jax.sharding.AbstractMesh((4,), ('tensor',), axis_types=(AxisType.Auto,))
    hidden, kernel, weights, args, _ = operands(reference.draw(), 'float32')

    def call(vocab_size):
        return linear_loss(hidden, kernel, weights, args, cross_entropy(), vocab_size=vocab_size)

    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match='a vocabulary of 31 rows does not divide over pipe=1 x tensor=4: pad it'),
    ):
        jax.eval_shape(lambda: call(V))
    with pytest.raises(ValueError, match='vocab_size=32: the kernel has 31 rows in all'):
        jax.eval_shape(lambda: call(32))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'temperature': 0.0}, r'temperature=0\.0: expected a positive number'),
        ({'form': 'ghost'}, "form='ghost': expected one of tail, truncated, renormalized, or None"),
    ],
)
def test_losses_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        distillation(**options)


def test_losses_that_a_student_escapes_are_refused():
    """Renormalized on the teacher's words, its own mass elsewhere costs a student nothing."""
    reverse = Divergence('reverse_kl')
    for form in ('truncated', 'renormalized'):
        with pytest.raises(
            ValueError, match=f"reverse_kl with form='{form}' .* the student may leave the teacher's words"
        ):
            distillation((0.5, Divergence()), (0.5, reverse), form=form)
    with pytest.raises(ValueError, match='kl is given twice'):
        distillation((0.5, Divergence()), (0.5, Divergence()))
    assert distillation((1.0, reverse), form='tail')


MIXTURE = ((0.7, Divergence('jsd', beta=0.3)), (0.2, Divergence('reverse_kl')), (0.4, Divergence('total_variation')))
# On truncated words a reverse divergence is refused.
MIXTURES = dict.fromkeys((None, 'tail'), MIXTURE) | {
    'truncated': (MIXTURE[0], (0.2, Divergence('skew_kl')), MIXTURE[2])
}


def test_a_mixture_of_divergences_is_the_sum_of_its_parts_at_any_temperature():
    """Dense and sparse, over tensor and padded; rows without weight hold NaN and ids that are none: nothing changes."""
    case, temperature = reference.draw(4), 1.7
    teacher = reference.log_softmax(case.teacher_hidden @ case.teacher_kernel.T / temperature)
    ids = np.argsort(-teacher, axis=-1)[:, :5].astype(np.int32)
    logp = np.take_along_axis(teacher, ids, axis=-1)
    nothing = np.flatnonzero(case.weights == 0)
    assert len(nothing) > 2
    ids[nothing[0]], logp[nothing[0]] = 10**6, np.nan
    hidden, kernel, weights, args, shared = operands(case, pad=1)
    args['teacher_hidden'][nothing[1]] = np.nan
    hidden[nothing[0]] = np.nan
    args['targets'] = np.where(case.weights == 0, -5, args['targets']).astype(np.int32)
    args |= {'sparse_target': SparseTarget(ids, logp)}
    options = {'alpha': 0.6, 'temperature': temperature}

    @jax.jit
    def run(hidden, kernel, weights, args, shared):
        found = {}
        for form in (None, *FORMS[:2]):
            mixture = MIXTURES[form]
            for name, terms in {'all': mixture, **{term[1].name: (term,) for term in mixture}}.items():
                loss = distillation(*terms, **options, form=form)
                found[f'{form} {name}'] = differentiated(loss, vocab_size=V, chunk=6)(
                    hidden, kernel, weights, args, shared
                )
            found[f'{form} ce'] = differentiated(distillation(alpha=0.0, form=form), vocab_size=V, chunk=9)(
                hidden, kernel, weights, args, shared
            )
        return found

    with jax.enable_x64(True), jax.set_mesh(mesh_of({'data': 2, 'tensor': 4})):
        found = jax.tree.map(np.asarray, run(hidden, kernel, weights, args, shared))
    for form in (None, *FORMS[:2]):
        (total, sums), gradients = found[f'{form} all']
        parts = [found[f'{form} {divergence.name}'] for _, divergence in MIXTURES[form]]
        (ce, _), ce_gradients = found[f'{form} ce']
        # Each part has 0.4 of the cross-entropy; the mixture has it once.
        assert total == pytest.approx(sum(part[0][0] for part in parts) - 2 * 0.4 * ce, rel=1e-11)
        for which in range(2):
            wanted = sum(part[1][which] for part in parts) - 2 * 0.4 * ce_gradients[which]
            np.testing.assert_allclose(gradients[which], wanted, atol=1e-13)
            assert np.isfinite(gradients[which]).all()
        weighted = sum(weight * sums[divergence.name][0] for weight, divergence in MIXTURES[form])
        assert total == pytest.approx(0.6 * temperature**2 * weighted + 0.4 * sums['ce'][0], rel=1e-11)
        assert ('tail' in sums) == (form is not None)
    p = np.exp(logp)
    tail = np.sum((case.weights * (1 - p.sum(axis=-1)))[case.weights > 0])
    assert found['tail all'][0][1]['tail'][0] == pytest.approx(tail, rel=1e-9)
    rest = 1 - p.sum(axis=-1)
    entropy = -(p * logp).sum(axis=-1) - rest * np.log(rest)
    wanted = np.sum((case.weights * entropy)[case.weights > 0])
    assert found['tail all'][0][1]['teacher_entropy'][0] == pytest.approx(wanted, rel=1e-9)
    agreement = np.argmax(case.hidden @ case.kernel.T, axis=-1) == np.argmax(teacher, axis=-1)
    for form in (None, *FORMS[:2]):
        wanted = np.sum((case.weights * agreement)[case.weights > 0])
        assert found[f'{form} all'][0][1]['agreement'][0] == pytest.approx(wanted, rel=1e-9)


def test_without_the_square_a_temperature_shrinks_the_loss():
    case = reference.draw(5)
    arrays = operands(case)
    losses = [distillation(temperature=2.0, squared=squared) for squared in (True, False)]

    @jax.jit
    def run(*arrays):
        return [differentiated(loss, vocab_size=V)(*arrays) for loss in losses]

    with jax.enable_x64(True):
        (with_square, without) = run(*arrays)
    assert float(with_square[0][0]) == pytest.approx(4 * float(without[0][0]), rel=1e-13)
    np.testing.assert_allclose(with_square[1][0], 4 * np.asarray(without[1][0]), rtol=1e-12)
    assert_close(with_square, reference.distillation(case, 1.0, 2.0), 1e-12)
