"""Pairs of hidden states on a dozen meshes against float64 on one device; what they are called, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distilled_steps import CASES, parameters, projected, reference, step_on
from sharded_steps import MODELS, make_batch, worst_error

from jpt.config import ConfigError
from jpt.distill.objective import logit_distillation
from jpt.distill.pairs import HiddenPair, add_pairs, check_pairs, new_projections
from jpt.distill.settings import DistillConfig
from jpt.models.config import Compute

MESHES = {
    'one': ('widths', {'data': 1}, 1, {}),
    'data-fsdp-tensor': ('widths', {'data': 2, 'fsdp': 2, 'tensor': 2}, 2, {}),
    'pipe-context-interleaved': ('widths', {'pipe': 2, 'context': 2, 'data': 2}, 2, {'chunks': 2}),
    'pipe-fsdp-tensor': ('widths', {'pipe': 2, 'fsdp': 2, 'tensor': 2}, 4, {}),
    'gpipe-data': ('widths', {'pipe': 4, 'data': 2}, 4, {'schedule': 'gpipe'}),
    'experts-context-tensor': ('experts', {'expert': 2, 'context': 2, 'tensor': 2}, 2, {}),
    'experts-pipe-fsdp': ('experts', {'pipe': 2, 'expert': 2, 'fsdp': 2}, 2, {}),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize('name', MESHES)
def test_loss_and_gradients_are_those_of_one_device(name):
    case, sizes, microbatches, options = MESHES[name]
    step = step_on(*CASES[case], *parameters(case), sizes, microbatches, **options)
    total, grads, means = reference(case)
    assert step.total == pytest.approx(total, rel=1e-10)
    assert worst_error(step.grads, grads) < 1e-10
    tokens = make_batch(53).loss_mask.sum()
    for pair in CASES[case].distill.pairs:
        for key, wanted in ((pair.name, means[pair.name]), (f'{pair.name}-weighted', pair.weight * means[pair.name])):
            value, count = step.sums[key]
            assert float(count) == pytest.approx(tokens, rel=1e-12)
            assert float(value) == pytest.approx(wanted * tokens, rel=1e-10)
    assert float(step.sums['loss'][0]) == pytest.approx(total * tokens, rel=1e-10)
    rest = total - sum(pair.weight * means[pair.name] for pair in CASES[case].distill.pairs)
    assert float(step.sums['logits_loss'][0]) == pytest.approx(rest * tokens, rel=1e-10)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_pairs():
    """On a pipeline, with a pair of every loss: neither loss nor gradient, up to rounding."""
    cfg, (params, _) = CASES['widths'].student, parameters('widths')
    pairs = (
        HiddenPair('layers.4.output', 'layers.4.output'),
        HiddenPair('layers.1.attention', 'layers.1.attention', 'mse', 3.0),
        HiddenPair('embed.output', 'layers.0.input', 'smooth_l1', 2.0, 0.1),
    )
    same = {name: part for name, part in params.items() if name != 'projections'}
    step = step_on(cfg, cfg, DistillConfig(pairs=pairs), same, same, {'pipe': 2, 'tensor': 2}, 2)
    assert abs(step.total) < 1e-12
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(step.grads)) < 1e-12


def test_tokens_without_weight_may_hold_anything_and_teachers_are_not_trained():
    random = np.random.default_rng(0)
    pairs = (
        HiddenPair('layers.0.input', 'layers.0.output', 'mse', 0.5, projection=True),
        HiddenPair('layers.0.output', 'layers.1.output', weight=2.0, projection=True),
    )
    weights = np.array([[0.5, 0, 0.25], [0, 0.25, 0]])
    params = {'projections': {pair.key: {'to_teacher': {'kernel': random.normal(size=(4, 5))}} for pair in pairs}}
    student = {pair.student: random.normal(size=(2, 3, 5)) for pair in pairs}
    teacher = {pair.teacher: random.normal(size=(2, 3, 4)) for pair in pairs}

    def loss(params, student, teacher):
        nothing = jnp.zeros(()), {'loss': (jnp.zeros(()), jnp.ones(()))}
        return add_pairs(nothing, pairs, params, {'student': student, 'teacher': teacher}, {'teacher': weights})[0]

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    spoil = functools.partial(jax.tree.map, lambda x: np.where(weights[..., None] == 0, np.nan, x))
    clean, dirty = run(params, student, teacher), run(params, spoil(student), spoil(teacher))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(clean[1][:2]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(clean[1][2]))


WIDE, NARROW = CASES['widths'].student, CASES['widths'].teacher


@pytest.mark.parametrize(
    ('pair', 'words'),
    [
        (('layers.6.output', 'embed.output'), r"pairs\[1\]\.student: 'layers\.6\.output': expected .* N from 0 to 5"),
        (('layers.5.output', 'layers.5.input'), r"pairs\[1\]\.teacher: 'layers\.5\.input': expected .* N from 0 to 4"),
        (('layers.05.output', 'embed.output'), r"pairs\[1\]\.student: 'layers\.05\.output': expected 'embed\.output'"),
        (('layers.0.mlp', 'embed.output'), r"pairs\[1\]\.student: 'layers\.0\.mlp': expected .*'layers\.N\.attention'"),
        (('embed.output', 'embed.output'), r"cosine of 'embed\.output' and 'embed\.output' is .*pairs\[0\] already"),
    ],
)
def test_pairs_that_the_models_do_not_have_are_named(pair, words):
    pairs = (projected('embed.output', 'embed.output'), projected(*pair, weight=0.1))
    with pytest.raises(ValueError, match=words):
        logit_distillation(WIDE, {'teacher': NARROW}, Compute(), DistillConfig(pairs=pairs))


def test_a_projection_is_there_where_widths_differ_and_only_there():
    pair = HiddenPair('embed.output', 'embed.output')
    with pytest.raises(ValueError, match=r"pairs\[0\]\.projection=False: expected True, .* is 16 and the teacher's 12"):
        check_pairs([pair], WIDE, {'teacher': NARROW})
    with pytest.raises(ValueError, match=r"projection=True: expected False, .* is 16 and the teacher's 16"):
        check_pairs([projected('embed.output', 'embed.output')], WIDE, {'teacher': WIDE})
    check_pairs([pair, HiddenPair('embed.output', 'embed.output', 'mse')], WIDE, {'teacher': WIDE})


def test_a_pair_names_its_teacher_where_there_are_several():
    pairs = [
        HiddenPair('embed.output', 'embed.output', of='math'),
        HiddenPair('embed.output', 'embed.output', of='code'),
    ]
    check_pairs(pairs, WIDE, {'math': WIDE, 'code': WIDE})
    assert [pair.name for pair in pairs] == [f'cosine-embed.output-{of}.embed.output' for of in ('math', 'code')]
    with pytest.raises(ValueError, match=r"pairs\[1\]\.of='code': expected a teacher: math"):
        check_pairs(pairs, WIDE, {'math': WIDE})


def test_attention_of_a_layer_that_has_none_is_refused():
    with pytest.raises(ValueError, match=r'layer 3 mixes no tokens: expected N of 0, 1, 2, 4, 6'):
        check_pairs([HiddenPair('layers.3.attention', 'embed.output')], MODELS['hybrid'], {'teacher': WIDE})


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'weight': 0.0}, r'HiddenPair\.weight=0\.0: expected a positive number; leave the pair out'),
        ({'weight': float('nan')}, r'HiddenPair\.weight=nan'),
        ({'beta': 2.0}, r"HiddenPair\.beta=2\.0: expected 1, unless loss is 'smooth_l1'"),
        ({'loss': 'smooth_l1', 'beta': 0.0}, r'HiddenPair\.beta=0\.0: expected a positive number'),
    ],
)
def test_numbers_that_make_no_loss_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        HiddenPair('embed.output', 'embed.output', **fields)


def test_a_projection_does_not_depend_on_other_pairs():
    """Its variance is 1 / 16."""
    pairs = CASES['widths'].distill.pairs
    drawn = new_projections(pairs, WIDE, {'teacher': NARROW}, jax.random.key(1), 'float32')
    assert list(drawn) == [pair.key for pair in pairs]
    for pair in pairs:
        alone = new_projections([pair], WIDE, {'teacher': NARROW}, jax.random.key(1), 'float32')
        jax.tree.map(np.testing.assert_array_equal, alone[pair.key], drawn[pair.key])
    every = np.stack(jax.tree.leaves(drawn))
    assert every.shape == (5, 12, 16)
    assert len({leaf.tobytes() for leaf in every}) == 5
    assert every.std() == pytest.approx(0.25, rel=0.05)
