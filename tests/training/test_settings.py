"""Settings that do not go together are refused by name; those that records with teachers of their own need."""

import pytest
from tiny import ARCHITECTURE, settings

from jpt.config import ConfigError

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
        ({'task': 'pretrain', 'teachers': {}}, r'teachers=\{\}: expected two teachers or more, task .distill.'),
        ({'teachers': {'code': SEVERAL['code']}}, r'teachers=.* expected two teachers or more'),
        ({'teachers': {}, 'teacher': SEVERAL['code']}, r'teachers=\{\}: expected two teachers or more'),
        (
            {'teachers': {}, 'distill': {'targets': 'recorded'}},
            r'expected two .*distill\.targets=None where data',
        ),
        (
            {'teachers': SEVERAL | {'code': {'path': 'models/code', 'weight': 3.0}}},
            r'teachers=.* expected weights of 1 where data\.route_key is set',
        ),
        ({'eval': {'data': TEXT}}, r'eval=.*expected data\.route_key set in both or in neither'),
        ({'data': TEXT, 'eval': {'data': ROUTED}}, r'eval=.*expected data\.route_key set in both or in neither'),
    ],
)
def test_a_key_of_routes_needs_teachers_to_go_to(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **changes)
