"""Schedules against closed forms."""

import math

import jax
import numpy as np
import pytest

from jpt.config import ConfigError
from jpt.training.schedule import ScheduleConfig, make_schedule


def _share(form: str, r: float) -> float:
    return {'linear': 1 - r, 'cosine': (1 + math.cos(math.pi * r)) / 2, 'minus_sqrt': 1 - math.sqrt(r), 'constant': 1}[
        form
    ]


@pytest.fixture(scope='module')
def learning_rates():
    """All schedules over their run and beyond, by one compiled program."""
    schedules = {name: make_schedule(config, steps) for name, (config, steps) in CASES.items()}
    values = jax.jit(lambda n: {name: jax.vmap(schedule)(n) for name, schedule in schedules.items()})(np.arange(45))
    return jax.tree.map(np.asarray, values)


CASES = {
    **{
        f'{kind}_{warmup}': (ScheduleConfig(kind, lr=0.2, min_lr=0.02 * (kind != 'constant'), warmup=warmup), 20)
        for kind in ('constant', 'linear', 'cosine')
        for warmup in (0, 4)
    },
    **{
        f'wsd_{form}': (ScheduleConfig('wsd', lr=0.1, min_lr=0.01, warmup=2, decay_steps=5, decay=form), 20)
        for form in ('linear', 'cosine', 'minus_sqrt')
    },
    'wsd_default': (ScheduleConfig('wsd', lr=1.0), 40),
}


@pytest.mark.parametrize('kind', ['constant', 'linear', 'cosine'])
@pytest.mark.parametrize('warmup', [0, 4])
def test_warmup_then_decay(kind, warmup, learning_rates):
    low = 0.0 if kind == 'constant' else 0.02
    for n in range(26):
        r = min(max(n - warmup, 0) / (20 - warmup), 1.0)
        expected = 0.2 * (n + 1) / (warmup + 1) if n < warmup else low + (0.2 - low) * _share(kind, r)
        assert learning_rates[f'{kind}_{warmup}'][n] == pytest.approx(expected, rel=1e-5, abs=1e-7), n


@pytest.mark.parametrize('form', ['linear', 'cosine', 'minus_sqrt'])
def test_wsd_holds_and_then_decays(form, learning_rates):
    expected = [0.1 / 3, 0.2 / 3] + [0.1] * 13 + [0.01 + 0.09 * _share(form, k / 5) for k in range(6)] + [0.01] * 2
    np.testing.assert_allclose(learning_rates[f'wsd_{form}'][:23], expected, rtol=1e-5)


def test_wsd_decays_over_a_tenth_unless_told(learning_rates):
    assert learning_rates['wsd_default'][35:39].tolist() == pytest.approx([1.0, 1.0, 0.75, 0.5])


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'lr': 0.0}, r'ScheduleConfig\.lr=0\.0: expected a positive number'),
        ({'lr': 0.1, 'min_lr': 0.2}, r'min_lr=0\.2: expected a number from 0 to lr=0\.1'),
        ({'warmup': -1}, 'warmup=-1: expected an integer of 0 or more'),
        ({'kind': 'wsd', 'decay_steps': 0}, 'decay_steps=0: expected a positive integer'),
        ({'kind': 'cosine', 'decay_steps': 5}, "decay_steps=5: expected None when kind='cosine'"),
        ({'kind': 'constant', 'min_lr': 1e-4}, "min_lr=0.0001: expected 0 when kind='constant'"),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**values)


def test_a_schedule_must_fit_into_its_run():
    with pytest.raises(ValueError, match=r'schedule\.warmup=20: expected less than steps=20'):
        make_schedule(ScheduleConfig(warmup=20), 20)
    with pytest.raises(ValueError, match=r'schedule\.decay_steps=15: expected at most steps - warmup = 10'):
        make_schedule(ScheduleConfig('wsd', warmup=10, decay_steps=15), 20)
