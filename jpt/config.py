"""The border between a user's settings and the program: ConfigDict or JSON in, validated frozen dataclasses out.

A config file returns `config_dict(TrainConfig, {...})`: a locked ConfigDict with every field of the dataclass, so that
each can be overridden on the command line. A main calls `from_config_dict` once; nothing inside takes a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections import config_dict as ml_config_dict

Config = TypeVar('Config')

_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), 'True or False'),
    int: ((int,), 'an integer'),
    float: ((float, int), 'a number'),
    str: ((str,), 'a string'),
}


class ConfigError(ValueError):
    """A setting that does not hold: where it stands, its value and what is allowed."""

    def __init__(self, owner: str, field: str, value: object, expected: str):
        super().__init__(f'{owner}.{field}={value!r}: expected {expected}')
        self.field, self.value, self.expected = field, value, expected


def require(config: object, field: str, holds: bool, expected: str) -> None:
    """Raises a ConfigError for `field` of a dataclass unless `holds`; for use in `__post_init__`."""
    if not holds:
        raise ConfigError(type(config).__name__, field, getattr(config, field), expected)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest allowed one, if close, and all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    return f'{hint}expected one of {", ".join(names)}'


def from_config_dict(cls: type[Config], values: Any, place: str) -> Config:
    """Makes the dataclass `cls` from a ConfigDict or a dict, and all dataclasses within it.

    Types are strict: no bool or 2.0 for an int, no string for a number, None only where the field is optional; an int
    is taken for a float. `place` is where the values stand, for messages ('config').

    Raises:
        ConfigError: unknown or missing key, wrong type, or a value that the dataclass refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(_as_dataclass(cls)) if field.init}
    if not isinstance(values, Mapping | ConfigDict):
        raise ConfigError(*_split(place), values, f'a mapping with the fields of {cls.__name__}')
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(place, name, value, f'a field of {cls.__name__}: {nearest(name, fields)}')
    hints = typing.get_type_hints(cls)
    arguments = {name: _convert(hints[name], value, f'{place}.{name}') for name, value in values.items()}
    for name, field in fields.items():
        if name not in arguments and _default(field) is dataclasses.MISSING:
            raise ConfigError(place, name, None, 'a value: this field has no default')
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(place, error.field, error.value, error.expected) from None


def config_dict(cls: type, values: Mapping[str, Any]) -> ConfigDict:
    """A locked ConfigDict with every field of the dataclass `cls`: `values`, and defaults for the rest.

    Fields that are None or have no default become typed placeholders, so that the command line can fill them.

    Raises:
        ConfigError: a key of `values`, at any depth, that is not a field.
    """
    config = ConfigDict(_fill(cls, values, cls.__name__))
    config.lock()
    return config


def _fill(cls: type, values: Mapping[str, Any], place: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(_as_dataclass(cls)) if field.init}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(place, name, value, f'a field of {cls.__name__}: {nearest(name, fields)}')
    filled = {}
    for name, field in fields.items():
        default = _default(field)
        value = values.get(name, None if default is dataclasses.MISSING else default)
        kind = _optional(hints[name])[0]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if value is None:
            simple = typing.get_origin(kind) or kind
            simple = object if dataclasses.is_dataclass(kind) else simple  # a mapping, of either kind
            value = ml_config_dict.placeholder(simple) if simple in (*_SCALARS, tuple, object) else None
        elif dataclasses.is_dataclass(kind):
            value = _fill(typing.cast(type, kind), value, f'{place}.{name}')
        elif typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0]):
            item = typing.get_args(kind)[0]
            value = tuple(ConfigDict(_fill(item, v, f'{place}.{name}[{i}]')) for i, v in enumerate(value))
        filled[name] = value
    return filled


def _convert(kind: Any, value: Any, place: str) -> Any:
    kind, optional = _optional(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        return from_config_dict(typing.cast(type, kind), value, place)
    if origin is typing.Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ConfigError(*_split(place), value, f'one of {", ".join(map(repr, arguments))}')
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, place)
    if origin is dict:
        if not isinstance(value, Mapping | ConfigDict):
            raise ConfigError(*_split(place), value, 'a mapping')
        return {key: _convert(arguments[1], item, f'{place}.{key}') for key, item in value.items()}
    if kind is object:
        return value.to_dict() if isinstance(value, ConfigDict) else value
    if kind not in _SCALARS:
        raise TypeError(f'{place}: a config field of type {kind} is not supported')
    allowed, expected = _SCALARS[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(*_split(place), value, expected + (' or None' if optional else ''))
    return float(typing.cast(float, value)) if kind is float else value


def _convert_tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ConfigError(*_split(place), value, 'a tuple')
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ConfigError(*_split(place), value, f'a tuple of {len(kinds)} items')
    return tuple(_convert(kind, item, f'{place}[{i}]') for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _optional(kind: Any) -> tuple[Any, bool]:
    """Splits `X | None` into X and whether None was there."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    rest = [choice for choice in typing.get_args(kind) if choice is not type(None)]
    if len(rest) != 1:
        raise TypeError(f'a config field of type {kind} is not supported')
    return rest[0], len(rest) < len(typing.get_args(kind))


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _as_dataclass(cls: Any) -> Any:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f'{cls}: expected a dataclass')
    return cls


def _split(place: str) -> tuple[str, str]:
    owner, _, field = place.rpartition('.')
    return owner, field
