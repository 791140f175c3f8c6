"""The converter from settings to dataclasses: what it takes, what it refuses, and the messages."""

import dataclasses
import json
from typing import Literal

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from jpt.config import ConfigError, config_dict, from_config_dict, nearest, require


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal['a', 'b', 2] = 'a'

    def __post_init__(self) -> None:
        require(self, 'rate', self.rate > 0, 'a positive number')


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    flag: bool = False
    name: str | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    sources: tuple[Source, ...] = ()
    extra: dict[str, object] = dataclasses.field(default_factory=dict)


def test_everything_supported_is_converted_and_ints_are_numbers():
    values = {
        'steps': 3,
        'flag': True,
        'name': 'x',
        'inner': {'rate': 2, 'kind': 2},
        'maybe': {'kind': 'b'},
        'betas': [0, 1],
        'sources': ({'path': 'p', 'weight': 3},),
        'extra': {'hidden_size': 4},
    }
    expected = Outer(3, True, 'x', Inner(2.0, 2), Inner(0.1, 'b'), (0.0, 1.0), (Source('p', 3.0),), {'hidden_size': 4})
    made = from_config_dict(Outer, ConfigDict(values), 'config')
    assert made == expected
    assert type(made.inner.rate) is float
    assert from_config_dict(Outer, json.loads(json.dumps(dataclasses.asdict(expected))), 'config') == expected


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (
            {'stesp': 3},
            r"config\.stesp=3: expected a field of Outer: did you mean 'steps'\? expected one of",
        ),
        ({'steps': 1, 'inner': {'rte': 1.0}}, r"config\.inner\.rte=1\.0: .*did you mean 'rate'"),
        ({}, r'config\.steps=None: expected a value: this field has no default'),
        ({'steps': True}, r'config\.steps=True: expected an integer$'),
        ({'steps': 2.0}, r'config\.steps=2\.0: expected an integer$'),
        ({'steps': '3'}, r"config\.steps='3': expected an integer$"),
        ({'steps': None}, r'config\.steps=None: expected an integer$'),
        ({'steps': 1, 'flag': 1}, r'config\.flag=1: expected True or False$'),
        ({'steps': 1, 'name': 4}, r'config\.name=4: expected a string or None$'),
        ({'steps': 1, 'inner': {'rate': '1e-3'}}, r"config\.inner\.rate='1e-3': expected a number$"),
        ({'steps': 1, 'inner': {'kind': 'c'}}, r"config\.inner\.kind='c': expected one of 'a', 'b', 2$"),
        ({'steps': 1, 'inner': {'kind': 2.0}}, r"config\.inner\.kind=2\.0: expected one of 'a', 'b', 2$"),
        ({'steps': 1, 'maybe': {'rate': -1.0}}, r'config\.maybe\.rate=-1\.0: expected a positive number$'),
        ({'steps': 1, 'inner': None}, r'config\.inner=None: expected a mapping with the fields of Inner$'),
        ({'steps': 1, 'betas': (0.9,)}, r'config\.betas=\(0\.9,\): expected a tuple of 2 items$'),
        ({'steps': 1, 'betas': 0.9}, r'config\.betas=0\.9: expected a tuple$'),
        ({'steps': 1, 'sources': [{'weight': 1.0}]}, r'config\.sources\[0\]\.path=None: expected a value'),
        ({'steps': 1, 'extra': 3}, r'config\.extra=3: expected a mapping$'),
    ],
)
def test_errors_name_place_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(Outer, values, 'config')


def test_a_dataclass_made_directly_names_itself():
    with pytest.raises(ConfigError, match=r'^Inner\.rate=0: expected a positive number$'):
        Inner(rate=0)


def test_unsupported_annotations_are_programming_errors():
    @dataclasses.dataclass
    class Odd:
        field: list[int] | int = 3

    with pytest.raises(TypeError, match='not supported'):
        from_config_dict(Odd, {'field': 3}, 'config')
    with pytest.raises(TypeError, match='expected a dataclass'):
        from_config_dict(int, {}, 'config')


def test_config_dict_has_every_field_and_refuses_unknown_ones():
    config = config_dict(Outer, {'steps': 5, 'inner': {'kind': 'b'}, 'sources': ({'path': 'p'},)})
    assert config.inner.to_dict() == {'rate': 0.1, 'kind': 'b'}
    assert config.is_locked
    assert from_config_dict(Outer, config, 'c') == Outer(5, inner=Inner(kind='b'), sources=(Source('p'),))
    with pytest.raises(ConfigError, match=r"Outer\.inner\.knd='b': .*did you mean 'kind'"):
        config_dict(Outer, {'inner': {'knd': 'b'}})
    with pytest.raises(ConfigError, match=r'Outer\.sources\[1\]\.file='):
        config_dict(Outer, {'sources': ({'path': 'p'}, {'file': 'q'})})


LOADS = pytest.mark.filterwarnings('ignore:.*load_module:DeprecationWarning')  # in ml_collections, on reading a file


def read_with(overrides, tmp_path, monkeypatch):
    """What a main gets of a config file with one source, and of overrides on its command line."""
    (tmp_path / 'c.py').write_text(
        f'import sys\nfrom jpt.config import config_dict\nOuter = sys.modules[{__name__!r}].Outer\n'
        "def get_config():\n    return config_dict(Outer, {'sources': ({'path': 'p'},)})\n"
    )
    arguments = ['main', f'--config={tmp_path / "c.py"}', *overrides]
    monkeypatch.setattr('sys.argv', arguments)  # config_flags looks there for the overrides
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values)
    values(arguments)
    return from_config_dict(Outer, flag.value, 'config')


@LOADS
def test_command_line_overrides_reach_defaults_placeholders_and_tuples(tmp_path, monkeypatch):
    overrides = [
        '--config.steps=7',
        '--config.name=run',
        '--config.inner.rate=1',
        '--config.sources[0].weight=2.5',
        '--config.betas=(0.8, 0.9)',
        "--config.maybe={'rate': 2}",
    ]
    made = read_with(overrides, tmp_path, monkeypatch)
    assert made == Outer(
        7, name='run', inner=Inner(1.0), betas=(0.8, 0.9), maybe=Inner(2.0), sources=(Source('p', 2.5),)
    )


@LOADS
def test_a_tuple_of_dataclasses_can_be_given_whole_on_the_command_line(tmp_path, monkeypatch):
    overrides = ['--config.steps=1', "--config.sources=({'path': 'q'}, {'path': 'r', 'weight': 2})"]
    assert read_with(overrides, tmp_path, monkeypatch).sources == (Source('q'), Source('r', 2.0))


def test_nearest_lists_all_names_and_hints_only_when_close():
    assert nearest('colour', ['color', 'size']) == "did you mean 'color'? expected one of color, size"
    assert nearest('zzz', ['color', 'size']) == 'expected one of color, size'


@dataclasses.dataclass(frozen=True)
class Traced:
    steps: tuple[int, int] | None = None


def test_an_optional_tuple_can_be_given_later():
    config = config_dict(Traced, {})
    assert from_config_dict(Traced, config, 'config') == Traced()
    config.steps = (2, 3)  # what a flag does; None without a type could not be overridden
    assert from_config_dict(Traced, config, 'config') == Traced((2, 3))
