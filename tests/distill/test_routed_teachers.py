"""Packed rows whose documents have teachers of their own, against a run with each teacher alone on what is its own."""

import functools

import jax
import numpy as np
import pytest
from distilled_steps import projected, step_of
from sharded_steps import make_batch, worst_error

from jpt.distill.pairs import HiddenPair, new_projections
from jpt.distill.settings import DistillConfig
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import init


def model(vocab, width, layers):
    return ModelConfig('llama', vocab, width, 2, 1, 4, (Segment((LayerKind(Rope(), None, 12),), layers),), 64)


# Tables and widths of several sizes.
MODELS = {'student': model(53, 8, 2), 'code': model(47, 8, 2), 'math': model(61, 12, 3)}
TEACHERS = ('code', 'math')
DISTILL = DistillConfig(
    forward_kl=0.7,
    reverse_kl=0.4,
    alpha=0.8,
    temperature=2.0,
    pairs=(
        HiddenPair('layers.0.output', 'layers.1.output', 'mse', 0.5, of='code'),
        projected('embed.output', 'layers.1.output', 'cosine', 0.7, of='math'),
        projected('layers.1.output', 'embed.output', 'mse', 0.2, of='math'),
    ),
)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def weights():
    shapes = {name: jax.eval_shape(functools.partial(init, cfg), jax.random.key(0)) for name, cfg in MODELS.items()}
    maps = jax.eval_shape(
        lambda key: new_projections(DISTILL.pairs, MODELS['student'], MODELS, key, 'float64'), jax.random.key(0)
    )
    shapes['student'] = shapes['student'] | {'projections': maps}
    random = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: 0.3 * random.normal(size=leaf.shape), shapes)


@functools.cache
def routed_batch():
    """Rows of two documents; one, none or both of them are of the first teacher, and padding is of nobody."""
    batch = make_batch(47)
    rows = np.arange(8)[:, None]
    route = np.where(batch.segment_ids == 1, rows % 2, rows // 2 % 2)
    return batch._replace(route=np.where(batch.segment_ids > 0, route, 0).astype(np.int32))


@functools.cache
def alone():
    """Of each teacher: the share of the tokens that are its own, and a step with it alone on these."""
    batch, steps = routed_batch(), {}
    whole = batch.loss_mask.sum()
    for number, name in enumerate(TEACHERS):
        own = batch._replace(loss_mask=np.where(batch.route == number, batch.loss_mask, 0), route=None)
        pairs = tuple(pair for pair in DISTILL.pairs if pair.of == name)
        distill = DistillConfig(0.7, 0.4, alpha=0.8, temperature=2.0, pairs=pairs)
        both = {'student': MODELS['student'], name: MODELS[name]}
        params = {'student': weights()['student'], name: weights()[name]}
        steps[name] = own.loss_mask.sum() / whole, step_of(both, distill, params, own, {'data': 1})
    return steps


@pytest.mark.parametrize(
    ('sizes', 'microbatches'),
    [
        ({'data': 1}, 1),
        ({'data': 1}, 4),
        ({'pipe': 2, 'fsdp': 2}, 2),
        ({'context': 2, 'data': 2, 'tensor': 2}, 2),
    ],
)
def test_loss_and_gradients_are_those_of_each_teacher_on_its_own(sizes, microbatches):
    step = step_of(MODELS, DISTILL, weights(), routed_batch(), sizes, microbatches)
    singles = alone()
    assert step.total == pytest.approx(sum(share * one.total for share, one in singles.values()), rel=1e-10)
    summed = jax.tree.map(
        lambda *grads: sum(share * grad for (share, _), grad in zip(singles.values(), grads, strict=True)),
        *(one.grads for _, one in singles.values()),
    )
    assert worst_error(step.grads, summed) < 1e-10
    means = {name: float(value / count) for name, (value, count) in step.sums.items()}
    for name, (share, one) in singles.items():
        own = {key: float(value / count) for key, (value, count) in one.sums.items()}
        assert 0.1 < share < 0.9
        assert means[f'share/{name}'] == pytest.approx(share, rel=1e-10)
        for key in ('kl', 'reverse_kl'):
            assert means[f'{key}/{name}'] == pytest.approx(own[key], rel=1e-10)
        for pair in DISTILL.pairs:
            if pair.of == name:
                assert means[pair.name] == pytest.approx(own[pair.name], rel=1e-10)
                weighted = share * pair.weight * own[pair.name]
                assert means[f'{pair.name}-weighted'] == pytest.approx(weighted, rel=1e-10)
    parts = sum(means[f'{pair.name}-weighted'] for pair in DISTILL.pairs)
    assert means['loss'] == pytest.approx(means['logits_loss'] + parts, rel=1e-10)


def test_a_teacher_without_tokens_in_a_batch_adds_nothing():
    batch = routed_batch()
    only = batch._replace(route=np.zeros_like(batch.route))
    step = step_of(MODELS, DISTILL, weights(), only, {'data': 1})
    assert np.isfinite(step.total)
    for name in ('share/math', 'kl/math', DISTILL.pairs[1].name):
        assert float(step.sums[name][0]) == 0
    assert float(step.sums['kl/math'][1]) == float(step.sums[DISTILL.pairs[1].name][1]) == 0
    maps = jax.tree.leaves(step.grads['projections'])
    assert len(maps) == 2
    assert not any(leaf.any() for leaf in maps)
