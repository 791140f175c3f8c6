"""What a source gives: a text, a conversation, or token ids; and the errors that say which line is malformed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpt.data.chat import check_messages


class DataError(ValueError):
    """A record that cannot be used: `place` names the file and line, `reason` what is wrong with it."""

    def __init__(self, place: str, reason: str):
        super().__init__(f'{place}: {reason}')
        self.place, self.reason = place, reason


class Chat(NamedTuple):
    """A conversation, and the tools that its template may show."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None


class Routed(NamedTuple):
    """A record, and what its field of DataConfig.route_key holds, whatever that is; None where it has none."""

    record: str | Chat
    route: Any


Record = str | Chat | np.ndarray | Routed


class Fields(NamedTuple):
    """Which keys of a JSON object or parquet row make a record.

    text: of a document. messages: of a conversation. prompt, completion: of a conversation of one question and answer,
    if both are given. route: what names the record's teacher, if given.
    """

    text: str = 'text'
    messages: str = 'messages'
    prompt: str = ''
    completion: str = ''
    route: str = ''


def make_record(row: Any, fields: Fields, chat: bool, place: str) -> Record:
    """A text or a conversation from a JSON object, with its route where the fields have one.

    Raises DataError naming the place and what is missing.
    """
    if not isinstance(row, Mapping):
        raise DataError(place, f'expected a JSON object, found {type(row).__name__}')
    record = _text_or_chat(row, fields, chat, place)
    return Routed(record, row.get(fields.route)) if fields.route else record


def _text_or_chat(row: Mapping[str, Any], fields: Fields, chat: bool, place: str) -> str | Chat:
    for key in record_keys(fields, chat):
        if key not in row:
            other = fields.text if chat else fields.messages
            hint = f" (kind='{'text' if chat else 'chat'}' reads {other!r})" if other in row else ''
            raise DataError(place, f'no key {key!r}; there are {", ".join(map(str, row)) or "none"}{hint}')
    texts = [row[key] for key in record_keys(fields, chat)]
    if chat and not fields.prompt:
        check_chat(row[fields.messages], place)
        return Chat(row[fields.messages], read_tools(row.get('tools'), place))
    for key, text in zip(record_keys(fields, chat), texts, strict=True):
        if not isinstance(text, str):
            raise DataError(place, f'{key!r}: expected a string, found {type(text).__name__}')
        check_unicode(text, place)
    if chat:
        return Chat([{'role': 'user', 'content': texts[0]}, {'role': 'assistant', 'content': texts[1]}])
    return texts[0]


def record_keys(fields: Fields, chat: bool) -> tuple[str, ...]:
    """The keys that a row must have."""
    if not chat:
        return (fields.text,)
    return (fields.prompt, fields.completion) if fields.prompt else (fields.messages,)


def check_chat(messages: Any, place: str) -> None:
    """Raises DataError at `place` unless these are messages that can be learned from."""
    try:
        check_messages(messages)
    except ValueError as error:
        raise DataError(place, str(error)) from error


def read_tools(tools: Any, place: str) -> Sequence[Mapping[str, Any]] | None:
    """The JSON schemas of a conversation's tools; also from JSON text, as parquet files often hold them.

    Raises DataError at `place` where they are neither.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(place, f"'tools' is text, but not JSON: {error}") from error
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        return tools or None
    raise DataError(place, f"'tools': expected a list of objects, found {type(tools).__name__}")


def check_unicode(text: str, place: str) -> None:
    """Raises DataError for half a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode('utf-8')
    except UnicodeEncodeError as error:
        raise DataError(place, f'not Unicode text: {error}') from error
