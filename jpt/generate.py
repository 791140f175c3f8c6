"""Continue prompts: `python -m jpt.generate --model=DIR --prompt='...'`, or many from a file; plain text or chat."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging

from jpt.data.tokenizer import Tokenizer
from jpt.evaluation.rows import read_rows
from jpt.generation.prompts import default_eos_ids
from jpt.generation.result import GenerationResult
from jpt.model import Model, load

SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
_PROBE = 'the text of an answer'


class Prompt(NamedTuple):
    """A prompt as it was given (a text or messages), and its token ids where a chat template wrote them."""

    given: Any
    ids: list[int] | None


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string('model', None, "A Hugging Face directory, a jpt checkpoint, or 'quickstart'.", required=True)
    flags.DEFINE_multi_string('prompt', [], 'A prompt; may be given several times.')
    flags.DEFINE_string('prompts', None, 'A file: one prompt per line, or JSON lines with "prompt" or "messages".')
    flags.DEFINE_bool('chat', False, "Write prompts as the tokenizer's chat template does, as messages of a user.")
    flags.DEFINE_string('system', None, 'With --chat: the message of the system that comes first.')
    flags.DEFINE_integer('max_new_tokens', 128, 'The most tokens of each answer.')
    flags.DEFINE_float('temperature', 0.0, '0 takes the most probable token; 1 draws as the model says.')
    flags.DEFINE_integer('top_k', 0, 'Draw from the k most probable tokens; 0: all.')
    flags.DEFINE_float('top_p', 1.0, 'Draw from the most probable tokens that reach this probability together.')
    flags.DEFINE_float('min_p', 0.0, 'Draw from tokens at least this probable, relative to the most probable one.')
    flags.DEFINE_float('repetition_penalty', 1.0, 'Above 1: make tokens that are there already less probable.')
    flags.DEFINE_integer('seed', 0, 'Of the draws; prompt i uses seed + i.')
    flags.DEFINE_multi_string('stop', [], 'A string before which an answer ends; may be given several times.')
    flags.DEFINE_integer('batch_size', 32, 'Prompts at a time.')
    flags.DEFINE_string('dtype', None, 'Cast the weights, such as bfloat16; default: as they are stored.')
    flags.DEFINE_bool('stream', False, 'Show answers while they grow, one prompt after another.')
    flags.DEFINE_bool('logprobs', False, 'With --output: also the log-probabilities of the tokens.')
    flags.DEFINE_string('output', None, 'A file for the answers as JSON lines.')


def read_prompts(path: str) -> list[Any]:
    """The prompts of a file: texts, or lists of messages.

    Raises:
        ValueError: a JSON object without either; an empty file.
    """
    if Path(path).suffix not in ('.jsonl', '.ndjson', '.gz', '.xz'):
        found: list[Any] = [line for line in Path(path).read_text(encoding='utf-8').splitlines() if line.strip()]
    else:
        found = []
        for number, row in enumerate(read_rows(path), start=1):
            given = row.get('messages', row.get('prompt'))
            if not given or not isinstance(given, list if 'messages' in row else str):
                keys = ', '.join(row) or 'none'
                raise ValueError(
                    f'{path}: row {number}: expected "prompt" (a text) or "messages" (a list); keys: {keys}'
                )
            found.append(given)
    if not found:
        raise ValueError(f'--prompts={path} holds no prompts')
    return found


def as_chat(tokenizer: Tokenizer, given: Any, system: str | None) -> list[int]:
    """The ids of a conversation up to where the assistant answers. given: messages, or the text of a user's message."""
    messages = [{'role': 'user', 'content': given}] if isinstance(given, str) else list(given)
    if system is not None:
        messages.insert(0, {'role': 'system', 'content': system})
    return tokenizer.encode(tokenizer.chat_template().render(messages, add_generation_prompt=True))


def end_of_turn(tokenizer: Tokenizer) -> list[int]:
    """The special token that the chat template writes behind an answer; not every model's files name it as an end."""
    messages = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': _PROBE}]
    _, _, after = tokenizer.chat_template().render(messages).rpartition(_PROBE)
    return [token for token in tokenizer.encode(after) if token in tokenizer.special_ids][:1]


def prepare(model: Model, given: Any) -> tuple[list[Prompt], list[int]]:
    """The prompts of a command line and the ids that end an answer.

    Raises:
        ValueError: no prompt, both kinds, or messages without --chat.
    """
    if bool(given.prompt) == bool(given.prompts):
        raise ValueError('give either --prompt (once or more) or --prompts')
    texts = list(given.prompt) if given.prompt else read_prompts(given.prompts)
    chat = given.chat or not all(isinstance(text, str) for text in texts)
    ends = list(default_eos_ids(model))
    if given.system is not None and not chat:
        raise ValueError('--system needs --chat')
    if not chat:
        return [Prompt(text, None) for text in texts], ends
    if model.tokenizer is None:
        raise ValueError('a chat needs a tokenizer, and --model has none')
    tokenizer = model.tokenizer
    return [Prompt(text, as_chat(tokenizer, text, given.system)) for text in texts], ends + end_of_turn(tokenizer)


def answers(
    model: Model, prompts: Sequence[Prompt], given: Any, eos_ids: Sequence[int]
) -> Iterator[tuple[Prompt, GenerationResult]]:
    """The prompts with their answers, shown on the terminal as they come."""
    options = {name: getattr(given, name) for name in SAMPLING}
    options |= {'max_new_tokens': given.max_new_tokens, 'stop': given.stop, 'logprobs': given.logprobs}
    options |= {'eos_ids': eos_ids, 'batch_size': given.batch_size}
    inputs: list[Any] = [prompt.given if prompt.ids is None else prompt.ids for prompt in prompts]
    if not given.stream:
        for prompt, result in zip(prompts, model.generate(inputs, seed=given.seed, **options), strict=True):
            show(_heading(prompt) + result.text + '\n')
            yield prompt, result
        return
    for i, prompt in enumerate(prompts):
        show(_heading(prompt))
        (result,) = model.generate(inputs[i : i + 1], seed=given.seed + i, stream=lambda _, text: show(text), **options)
        show('\n')
        yield prompt, result


def show(text: str) -> None:
    """Writes to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _heading(prompt: Prompt) -> str:
    if isinstance(prompt.given, str):
        return prompt.given if prompt.ids is None else f'> {prompt.given}\n'
    return ''.join(f'{message["role"]}> {message.get("content")}\n' for message in prompt.given)


def record(prompt: Prompt, result: GenerationResult) -> dict[str, Any]:
    """One line of --output."""
    key = 'prompt' if isinstance(prompt.given, str) else 'messages'
    row = {key: prompt.given, 'text': result.text, 'finish_reason': result.finish_reason}
    row |= {'prompt_ids': result.prompt_ids, 'token_ids': result.token_ids}
    if result.logprobs is not None:
        row |= {'logprobs': result.logprobs, 'sampled_logprobs': result.sampled_logprobs}
    return row


def run(given: Any) -> None:
    """Everything a command line asks for (`given` has its flags as attributes)."""
    model = load(given.model, dtype=given.dtype, mtp=False)
    prompts, eos_ids = prepare(model, given)
    start = time.perf_counter()
    rows = [record(prompt, result) for prompt, result in answers(model, prompts, given, eos_ids)]
    seconds, count = time.perf_counter() - start, sum(len(row['token_ids']) for row in rows)
    print(f'{count:,} tokens in {seconds:.1f} s ({count / seconds:,.0f}/s, compiling included)', file=sys.stderr)
    if given.output:
        text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
        Path(given.output).write_text(text, encoding='utf-8')


def main(argv: list[str]) -> None:
    """Answers, or one line that says what is wrong."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)
    try:
        run(flags.FLAGS)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f'jpt.generate: {error}')


if __name__ == '__main__':
    define_flags()
    app.run(main)
