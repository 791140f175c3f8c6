"""A conversation as token ids, with loss on what the assistant wrote and on the token that ends its turn.

Whose text a token is comes from the template's own {% generation %} blocks, or, where it has none, from rendering the
conversation turn by turn: what the template writes up to the generation prompt is given, what follows is the answer.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jpt.data.alignment import Reading, common_length
from jpt.data.template import ChatTemplate, TemplateError
from jpt.data.tokenizer import Tokenizer

_PROBE = 'the content of this message'
_REMEDY = "Mark the assistant's text in the template with {% generation %} and {% endgeneration %}"


class ChatTokens(NamedTuple):
    """ids: int32 [n]; loss: float32 [n], the weight of predicting each token. reading: how a teacher reads the text."""

    ids: np.ndarray
    loss: np.ndarray
    reading: Reading | None = None  # where the teacher has a tokenizer of its own


class RenderedChat(NamedTuple):
    """A conversation as text.

    answers: the characters [start, end) of each answer, and its loss weight. marked: whether the template says where
    they are. ends_with_answer: whether the last message is the assistant's.
    """

    text: str
    answers: list[tuple[tuple[int, int], float]]
    marked: bool
    ends_with_answer: bool


def check_messages(messages: Any) -> None:
    """Raises ValueError unless `messages` is a list of OpenAI messages with at least one by the assistant."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'messages: expected a list that is not empty, found {_short(messages)}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
            raise ValueError(f'messages[{i}]: expected an object with "role" and "content", found {_short(message)}')
        content = message.get('content')
        if isinstance(content, list):
            others = [part for part in content if not _is_text_part(part)]
            if others:
                raise ValueError(
                    f'messages[{i}].content: expected parts {{"type": "text", "text": ...}} only, found '
                    f'{_short(others[0])}; images and sound are not read here'
                )
        elif not isinstance(content, str) and not (content is None and message.get('tool_calls')):
            raise ValueError(
                f'messages[{i}].content: expected a string, a list of text parts, or null beside tool_calls, found '
                f'{_short(content)}'
            )
        weight = message.get('weight', 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float('inf'):
            raise ValueError(f'messages[{i}].weight: expected a number of at least 0, found {_short(weight)}')
    if not any(message['role'] == 'assistant' for message in messages):
        raise ValueError('messages: none has the role "assistant", so there is nothing to learn from')


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> ChatTokens:
    """Token ids of a conversation and the loss weight of each: the assistant's tokens 1 (or the message's `weight`).

    The ids are those of the rendered text, so what the template writes is what is trained on. The token that ends an
    assistant's turn has loss, white space after it has not: no model generates that. A final answer that ends with no
    special token gets eos, with loss, or a model would never learn to stop.
    variables: passed on to the template, like enable_thinking.
    Raises ValueError for messages that are not OpenAI messages; TemplateError where the template refuses them or does
    not show where an answer begins and ends.
    """
    return encode_rendered(tokenizer, [render_chat(tokenizer, template, messages, tools=tools, **variables)])[0]


def render_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> RenderedChat:
    """The first half of `encode_chat`: the text, and where its answers are."""
    check_messages(messages := list(messages))
    messages = [_as_templates_expect(message, f'messages[{i}]') for i, message in enumerate(messages)]
    weights = [float(m.get('weight', 1)) for m in messages if m['role'] == 'assistant']
    text, spans = template.render_spans(messages, tools=tools, **variables)
    if not template.marks_generation:
        render = functools.partial(template.render, tools=tools, **variables)
        spans = answer_spans(render, messages, text, tokenizer.special_texts, template.name)
    elif len(spans) != len(weights):
        if set(weights) != {1.0}:
            raise TemplateError(
                f'chat template of {template.name}: {len(spans)} generation blocks for {len(weights)} assistant '
                'messages, so their "weight" cannot be told apart'
            )
        weights = [1.0] * len(spans)
    last = messages[-1]['role'] == 'assistant'
    return RenderedChat(text, list(zip(spans, weights, strict=True)), template.marks_generation, last)


def encode_rendered(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> list[ChatTokens]:
    """The second half of `encode_chat`, for many conversations on all cores."""
    encoded = tokenizer.encode_with_offsets([chat.text for chat in chats])
    return [_mask(tokenizer, chat, ids, offsets) for chat, (ids, offsets) in zip(chats, encoded, strict=True)]


def _mask(tokenizer: Tokenizer, chat: RenderedChat, ids: list[int], offsets: list[tuple[int, int]]) -> ChatTokens:
    first, last = np.array(offsets, np.int64).reshape(-1, 2).T
    last = np.maximum(last, first + 1)  # a token of no character (a byte, a prefix) counts with the one it stands at
    answers = [np.flatnonzero((first < end) & (last > start)) for (start, end), _ in chat.answers]
    if chat.marked:
        answers = _with_ends(tokenizer, chat, ids, answers)
    else:
        answers = [_without_space(tokenizer, ids, answer, chat.text, offsets) for answer in answers]
    loss = np.zeros(len(ids), np.float32)
    for answer, (_, weight) in zip(answers, chat.answers, strict=True):
        loss[answer] = weight
    if chat.ends_with_answer and answers and chat.answers[-1][1]:
        ended = len(answers[-1]) and ids[answers[-1][-1]] in tokenizer.special_ids
        if not ended:
            ids = [*ids, tokenizer.required_id('eos_token')]
            loss = np.append(loss, np.float32(chat.answers[-1][1]))
    return ChatTokens(np.array(ids, np.int32), loss)


def answer_spans(
    render: Callable[..., str],
    messages: Sequence[Mapping[str, Any]],
    text: str,
    special_texts: Sequence[str],
    name: str,
) -> list[tuple[int, int]]:
    """The characters [start, end) of every assistant message in `text`, the rendered conversation.

    An answer starts where the conversation before it, rendered with the generation prompt, ends. It ends where the
    conversation up to it, rendered alone, ends, or where `_end_of_turn` says.
    render: (messages, add_generation_prompt=False) -> text. name: the template's, for messages.
    Raises TemplateError where these do not meet.
    """
    messages = list(messages)
    spans = []
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        head = render(messages[:i], add_generation_prompt=True)
        if not text.startswith(head):
            parting = common_length(head, text)
            raise TemplateError(
                f'chat template of {name} is not prefix-stable: the conversation before messages[{i}], rendered with '
                f'the generation prompt, is not how the whole begins (they part at character {parting}). '
                f'{_REMEDY}'
            )
        alone = render(messages[: i + 1]) if i + 1 < len(messages) else text
        end = len(alone) if text.startswith(alone) else _end_of_turn(render, messages, i, text, special_texts, name)
        if end < len(head):
            raise TemplateError(f'chat template of {name}: messages[{i}] ends before it begins. {_REMEDY}')
        spans.append((len(head), end))
    return spans


def _end_of_turn(
    render: Callable[..., str],
    messages: list[Mapping[str, Any]],
    i: int,
    text: str,
    special_texts: Sequence[str],
    name: str,
) -> int:
    """Where messages[i] ends in `text` if the template writes the last turn differently from the others.

    Phi-3 adds eos to it, Qwen3 shows its thoughts only. The turn ends with the last of special_texts that follows the
    content in both ways; a probe in place of the content shows what follows it.
    """
    probe: Mapping[str, Any] = {**messages[i], 'content': _PROBE}
    _, found_alone, after_alone = render([*messages[:i], probe]).rpartition(_PROBE)
    _, found, after = render([*messages[:i], probe, *messages[i + 1 :]]).rpartition(_PROBE)
    common = after[: common_length(after, after_alone)]
    ends = [common.rfind(special) + len(special) for special in special_texts if special in common]
    if not (found and found_alone and ends and text.endswith(after)):
        raise TemplateError(
            f'chat template of {name}: cannot tell where messages[{i}] ends, because it is written differently when '
            f'another message follows. {_REMEDY}'
        )
    return len(text) - len(after) + max(ends)


def _with_ends(tokenizer: Tokenizer, chat: RenderedChat, ids: list[int], answers: list[np.ndarray]) -> list[np.ndarray]:
    """Adds the end-of-turn token to generation blocks that were closed just before it."""

    def following(answer: np.ndarray) -> list[int]:
        return ids[answer[-1] + 1 : answer[-1] + 2] if len(answer) else []

    ends = {tokenizer.eos_id}
    if chat.ends_with_answer and answers:
        ends.update(following(answers[-1]))  # nothing but an end of turn can follow the last answer
    ends &= tokenizer.special_ids
    closed = []
    for answer in answers:
        ended = len(answer) and ids[answer[-1]] in ends
        add = not ended and ends.intersection(following(answer))
        closed.append(np.append(answer, answer[-1] + 1) if add else answer)
    return closed


def _without_space(
    tokenizer: Tokenizer, ids: list[int], answer: np.ndarray, text: str, offsets: list[tuple[int, int]]
) -> np.ndarray:
    """Takes off the white space that follows the token which ends the turn: no model generates it."""
    for count in range(len(answer), 0, -1):
        token = answer[count - 1]
        if ids[token] in tokenizer.special_ids:
            return answer[:count]
        start, end = offsets[token]
        if text[start:end].strip():
            break
    return answer


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get('type') == 'text' and isinstance(part.get('text'), str)


def _as_templates_expect(message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The message in the form that templates of text models are written for.

    They add content to strings, so a list of text parts is joined; and they write the arguments of a tool call as JSON
    themselves, so OpenAI's JSON text is read first (vLLM does both, and what is trained must be what is served).
    Raises ValueError, with the place of the message, for arguments that are text but not JSON.
    """
    changes: dict[str, Any] = {}
    if isinstance(message.get('content'), list):
        changes['content'] = ''.join(part['text'] for part in message['content'])
    calls = message.get('tool_calls')
    if isinstance(calls, list):
        changes['tool_calls'] = [_with_read_arguments(call, f'{place}.tool_calls[{i}]') for i, call in enumerate(calls)]
    return {**message, **changes}


def _with_read_arguments(call: Any, place: str) -> Any:
    if not isinstance(call, Mapping) or not isinstance(function := call.get('function'), Mapping):
        return call
    arguments = function.get('arguments')
    if not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise ValueError(f'{place}.function.arguments: not JSON: {_short(arguments)}: {error}') from error
    return {**call, 'function': {**function, 'arguments': read}}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + '...'
