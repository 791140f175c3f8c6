"""Weights that follow a schedule, against their formula; and settings that mean nothing."""

import math

import numpy as np
import pytest

from jpt.config import ConfigError, from_config_dict
from jpt.distill.mixture import mixture
from jpt.distill.settings import DistillConfig, MixtureSchedule
from jpt.training.settings import TeacherSource


@pytest.mark.parametrize(
    ('kind', 'half_way', 'quarter'), [('linear', 0.5, 0.25), ('cosine', 0.5, (1 - math.cos(math.pi / 4)) / 2)]
)
def test_weights_go_from_first_to_last(kind, half_way, quarter):
    to = {'forward_kl': 0.0, 'reverse_kl': 2.0, 'alpha': 0.5}
    config = DistillConfig(total_variation=3.0, alpha=1.0, schedule=MixtureSchedule(to, end=50, begin=10, kind=kind))
    assert [divergence.name for _, divergence in config.terms()] == ['forward_kl', 'reverse_kl', 'total_variation']

    def weights(r):
        alpha = 1 - 0.5 * r
        return [alpha * (1 - r), alpha * 2 * r, alpha * 3, 1 - alpha]

    for step, r in {0: 0, 10: 0, 20: quarter, 30: half_way, 50: 1, 10**6: 1}.items():
        np.testing.assert_allclose(mixture(config, step), weights(r), rtol=1e-6, atol=1e-7)


def test_without_a_schedule_weights_stay():
    np.testing.assert_allclose(mixture(DistillConfig(reverse_kl=0.5, alpha=0.2), 7), [0.2, 0.1, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'to': {'kl': 1.0}, 'end': 5}, r'schedule\.to=.*expected weights of some of alpha, forward_kl'),
        ({'to': {'alpha': 1.5}, 'end': 5}, r'schedule\.to=.*alpha from 0 to 1'),
        ({'to': {'jsd': -1.0}, 'end': 5}, r'schedule\.to=.*numbers of 0 or more'),
        ({'to': {'jsd': 1.0}, 'end': 5, 'begin': 5}, r'schedule\.end=5: expected an integer above begin=5'),
    ],
)
def test_schedules_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(DistillConfig, {'schedule': values}, 'config.distill')


def test_a_divergence_may_begin_with_nothing():
    only_later = MixtureSchedule({'jsd': 1.0}, end=5)
    assert [weight for weight, _ in DistillConfig(forward_kl=0.0, schedule=only_later).terms()] == [0.0]
    with pytest.raises(ConfigError, match='a positive weight of one of'):
        DistillConfig(forward_kl=0.0)


def test_a_teacher_has_a_positive_weight():
    with pytest.raises(ConfigError, match=r'weight=0\.0: expected a positive number'):
        TeacherSource('folder', weight=0.0)
