"""Settings that do not go together are refused by name; those that records with teachers of their own need."""

import pytest
from absl import logging
from tiny import ARCHITECTURE, settings

from jpt.config import ConfigError
from jpt.distill.settings import DistillConfig, MixtureSchedule, RecordConfig

STUDENT = {'architecture': ARCHITECTURE}
SEVERAL = {name: {'path': f'models/{name}'} for name in ('code', 'math')}
TEXT = {'paths': ('train.jsonl',)}
ROUTED = {'paths': ('train.jsonl',), 'route_key': 'subject'}


def job(folder, **changes):
    given = {'task': 'distill', 'model': STUDENT, 'teachers': SEVERAL, 'data': ROUTED, 'eval': {}}
    return settings(folder, **given | changes)


def test_routes_are_the_names_of_the_teachers(tmp_path):
    assert job(tmp_path).routes() == ('code', 'math')
    assert job(tmp_path, data=TEXT).routes() == ()
    assert job(tmp_path, eval={'data': ROUTED | {'route_key': 'field'}}).routes() == ('code', 'math')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'task': 'pretrain', 'teachers': {}},
            r"route_key='subject': expected '', unless teachers names two",
        ),
        ({'teachers': {'code': SEVERAL['code']}}, r"data\.route_key='subject': expected ''"),
        ({'teachers': {}, 'teacher': SEVERAL['code']}, r"data\.route_key='subject': expected ''"),
        ({'teachers': {}, 'distill': {'targets': 'recorded'}}, r"data\.route_key='subject': expected ''"),
        (
            {'teachers': SEVERAL | {'code': {'path': 'models/code', 'weight': 3.0}}},
            r'config\.teachers\.code\.weight=3\.0: expected 1 where data\.route_key is set',
        ),
        (
            {'eval': {'data': TEXT}},
            r"eval\.data\.route_key='': expected a key, as data\.route_key is 'subj",
        ),
        (
            {'data': TEXT, 'eval': {'data': ROUTED}},
            r"eval\.data\.route_key='subject': expected '', as data",
        ),
    ],
)
def test_a_key_of_routes_needs_teachers_to_go_to(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **changes)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'beta': 0.3}, r'beta=0\.3: expected no setting of it without a weight of jsd'),
        ({'jsd_normalized': True}, r'jsd_normalized=True: expected no setting of it without a weight of jsd'),
        ({'skew': 0.2, 'jsd': 1.0}, r'skew=0\.2: expected no .* without a weight of skew_kl or skew_reverse_kl'),
    ],
)
def test_numbers_of_a_divergence_that_is_not_there_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**values)


def test_numbers_of_a_divergence_that_comes_later_are_taken():
    assert DistillConfig(beta=0.3, schedule=MixtureSchedule({'jsd': 1.0}, end=5)).beta == 0.3
    assert DistillConfig(skew=0.2, skew_reverse_kl=1.0).skew == 0.2


def test_at_least_so_many_words_is_a_setting_of_top_p():
    assert RecordConfig(top_p=0.9, at_least=4).at_least == 4
    with pytest.raises(ConfigError, match=r'at_least=4: expected 1 where top_p is None'):
        RecordConfig(at_least=4)


def test_a_form_that_lets_mass_escape_is_taken_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(logging, 'warning', said.append)
    DistillConfig(targets='recorded', form='truncated')
    assert not said
    DistillConfig(targets='recorded', form='renormalized')
    assert len(said) == 1
    assert 'any mass outside of them at no cost' in said[0]
