"""DataConfig: what it refuses, and how it says so."""

import pytest

from jpt.data.config import DataConfig


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'kind': 'sft'}, r"DataConfig\.kind='sft': expected one of text, chat"),
        ({'packing': 'best'}, r"DataConfig\.packing='best': expected one of best_fit, concat, none"),
        ({'malformed': 'ignore'}, r"DataConfig\.malformed='ignore': expected one of error, skip"),
        ({'long_documents': 'cut'}, r"DataConfig\.long_documents='cut': expected one of split, truncate, drop, error"),
        ({'paths': ('',)}, r"DataConfig\.paths=\('',\): expected names of files"),
        ({'paths': ('a', 'b'), 'weights': (1.0,)}, r'DataConfig\.weights=\(1\.0,\): .*each of the 2 paths'),
        ({'paths': ('a',), 'weights': (0.0,)}, r'DataConfig\.weights=\(0\.0,\): expected a positive number'),
        ({'paths': ('a',), 'weights': (float('nan'),)}, r'DataConfig\.weights'),
        ({'prompt_key': 'q'}, r"DataConfig\.completion_key='': expected a key where prompt_key is given"),
        ({'kind': 'chat', 'packing': 'concat'}, r"DataConfig\.packing='concat': expected best_fit or none"),
        ({'packing': 'concat', 'long_documents': 'drop'}, r"DataConfig\.long_documents='drop': expected split"),
        ({'window_rows': 0}, r'DataConfig\.window_rows=0: expected at least 1'),
        ({'prefetch': -1}, r'DataConfig\.prefetch=-1: expected at least 0'),
        ({'chat_date': '26 Jul'}, r"DataConfig\.chat_date='26 Jul': expected a day as YYYY-MM-DD"),
    ],
    ids=range(14),
)
def test_refusals_name_field_value_and_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_defaults_depend_on_the_kind():
    assert DataConfig().long_policy == 'split'
    assert DataConfig(kind='chat').long_policy == 'error'
    assert DataConfig(kind='chat', long_documents='drop').long_policy == 'drop'


def test_it_comes_from_a_config_dict():
    from jpt.config import config_dict, from_config_dict

    made = from_config_dict(DataConfig, config_dict(DataConfig, {'paths': ('a',), 'weights': (2.0,)}), 'config.data')
    assert made == DataConfig(paths=('a',), weights=(2.0,))
