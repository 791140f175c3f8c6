"""Chat templates: sandboxed jinja2 under the conventions of Hugging Face tokenizers, with the assistant's spans.

A template comes with a downloaded checkpoint and is code that others wrote: it runs in jinja2's immutable sandbox, on
plain JSON values only. Left out: functions as tools (a tool is its JSON schema) and multimodal content.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Two characters that Unicode reserves for a program's own use mark where {% generation %} begins and ends; so the spans
# survive macros, `set` blocks and loops, and are taken out of the text after rendering.
_OPEN, _CLOSE = '\ufdd0', '\ufdd1'


class TemplateError(ValueError):
    """A chat template that cannot be compiled, or that refuses the messages it was given."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """One chat template.

    source: the jinja2 text. name: where it comes from, for messages. special_tokens: bos_token, eos_token, ... as text.
    now: the time that `strftime_now` shows; None means the clock's. Training data must not depend on the day.
    """

    source: str
    name: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    now: datetime.datetime | None = None

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself, by {% generation %}, what the assistant wrote."""
        return re.search(r'\{%[-+]?\s*generation\s*[-+]?%\}', self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text. variables: whatever else the template reads, such as enable_thinking."""
        return self.render_spans(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)[0]

    def render_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the character spans [start, end) that the template marks as generated."""
        import jinja2

        given = json.dumps({'messages': list(messages), 'tools': tools, 'variables': variables}, ensure_ascii=False)
        if _OPEN in given or _CLOSE in given:
            raise TemplateError('the messages hold U+FDD0 or U+FDD1, which are reserved for marking generated text')
        plain = json.loads(given)  # the template sees JSON values and no object of ours
        try:
            marked = self._compiled.render(
                messages=plain['messages'],
                tools=plain['tools'],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **plain['variables']},
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f'chat template of {self.name}: {error}') from error
        except Exception as error:  # a template is a program that others wrote, it may fail in any way
            kind = type(error).__name__
            raise TemplateError(f'chat template of {self.name} fails on these messages: {kind}: {error}') from error
        return _take_marks_out(marked, self.name)

    @functools.cached_property
    def _compiled(self) -> Any:
        import jinja2

        try:
            return _environment(self.now).from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f'chat template of {self.name}, line {error.lineno}: {error.message}') from error


def _take_marks_out(marked: str, name: str) -> tuple[str, list[tuple[int, int]]]:
    text: list[str] = []
    spans: list[tuple[int, int]] = []
    start, length = -1, 0
    for piece in re.split(f'([{_OPEN}{_CLOSE}])', marked):
        if piece == _OPEN:
            if start >= 0:
                raise TemplateError(f'chat template of {name}: a {{% generation %}} block lies inside another')
            start = length
        elif piece == _CLOSE:
            spans.append((start, length))
            start = -1
        else:
            text.append(piece)
            length += len(piece)
    return ''.join(text), spans


def _environment(now: datetime.datetime | None) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: what lies between is written by the assistant."""

        tags = {'generation'}  # noqa: RUF012  (jinja2 reads a class attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method('mark'), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return _OPEN + caller() + _CLOSE

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(pattern: str) -> str:
        return (now or datetime.datetime.now()).strftime(pattern)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own filter escapes for HTML, which a model never sees.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters['tojson'] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
