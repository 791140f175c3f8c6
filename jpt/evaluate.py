"""Measure a model: `python -m jpt.evaluate --model=DIR --data=FILE [--task=perplexity|choices|numbers]`."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from jpt.data.batch import Batch
from jpt.data.sources import open_source
from jpt.evaluation import numbers
from jpt.evaluation.choices import multiple_choice, read_questions
from jpt.evaluation.perplexity import Score, perplexity
from jpt.evaluation.rows import read_rows
from jpt.evaluation.score import Reference, Scores, score
from jpt.model import Model, load

TASKS = ('perplexity', 'choices', 'numbers')


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string('model', None, "A Hugging Face directory, a jpt checkpoint, or 'quickstart'.", required=True)
    flags.DEFINE_string(
        'data', None, 'perplexity: text or JSON lines, or stdlib:held_out; else JSON lines.', required=True
    )
    flags.DEFINE_enum('task', 'perplexity', TASKS, 'What is measured.')
    flags.DEFINE_string('teacher', None, 'A model of the same vocabulary: adds KL(teacher || model) and agreement.')
    flags.DEFINE_string('examples', None, 'JSON lines with solved examples, put before every question.')
    flags.DEFINE_integer('shots', 5, 'How many examples.')
    flags.DEFINE_integer('limit', 0, 'Use so many texts or questions only; 0: all.')
    flags.DEFINE_integer('length', 0, 'Tokens of a window; 0: the length that the model was trained for, 4096 at most.')
    flags.DEFINE_integer('context', 0, 'Tokens of a window that repeat the end of the one before.')
    flags.DEFINE_integer('batch_size', 8, 'Windows, questions or prompts at a time.')
    flags.DEFINE_integer('max_new_tokens', 256, 'numbers: length of an answer.')
    flags.DEFINE_string('dtype', None, 'Cast the weights, such as bfloat16; default: as they are stored.')
    flags.DEFINE_string('output', None, 'A file for the results as JSON.')
    flags.DEFINE_bool('json', False, 'Print the results as one line of JSON at the end.')


def scorer(model: Model, teacher: Model | None = None) -> Score:
    """Scores of batches under a model, beside a teacher where there is one."""
    reference = None if teacher is None else Reference(teacher.config, teacher.params)

    def of(batch: Batch) -> Scores:
        return score(model.config, model.params, batch, reference=reference, compute=model.compute)

    return of


def text_perplexity(
    model: Model,
    texts: list[str],
    *,
    teacher: Model | None = None,
    length: int = 1024,
    context: int = 0,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Any:
    """Perplexity of a model on texts; see `jpt.evaluation.perplexity` for the definition.

    Raises:
        ValueError: the model has no tokenizer, or the teacher another one.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError('the model has no tokenizer, so texts cannot be scored')
    if teacher is not None and teacher.tokenizer is not None:
        ours, theirs = tokenizer.fingerprint(), teacher.tokenizer.fingerprint()
        if ours != theirs:
            raise ValueError(
                f'--teacher has another tokenizer ({theirs[:12]}): expected that of the model ({ours[:12]})'
            )
    return perplexity(
        scorer(model, teacher),
        tokenizer.encode_batch(texts, bos=tokenizer.adds_bos),
        sum(len(text.encode()) for text in texts),
        batch_size=batch_size,
        length=length,
        context=context,
        has_reference=teacher is not None,
        progress=progress,
    )


def read_texts(path: str, limit: int) -> list[str]:
    """The texts of a file or pattern.

    Raises:
        ValueError: records that are not texts.
    """
    source = open_source(path)
    texts = [source[i] for i in range(min(limit, len(source)) if limit else len(source))]
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f'{source.place(i)}: expected a text')
    return [text for text in texts if isinstance(text, str)]


def report_progress(unit: str) -> Callable[[int], None]:
    """Shows a count in one line on a terminal, and nothing elsewhere."""

    def show(count: int) -> None:
        if sys.stderr.isatty():
            print(f'\r{count:,} {unit}', end='', file=sys.stderr, flush=True)

    return show


def evaluate(given: Any) -> dict[str, Any]:
    """The results of one command line (`given` has its flags as attributes)."""
    model = load(given.model, dtype=given.dtype, mtp=False)
    if not model.config.causal:
        raise ValueError(f'--model={given.model}: {model.config.family} is an encoder: expected one that predicts text')
    length = given.length or min(model.config.max_length, 4096)
    if model.config.learned_positions and length > model.config.max_length:
        raise ValueError(f"--length={length}: expected at most the model's {model.config.max_length} positions")
    if given.task == 'perplexity':
        teacher = load(given.teacher, dtype=given.dtype, mtp=False) if given.teacher else None
        texts = read_texts(given.data, given.limit)
        found = text_perplexity(
            model,
            texts,
            teacher=teacher,
            length=length,
            context=given.context,
            batch_size=given.batch_size,
            progress=report_progress('tokens'),
        )
        return {name: value for name, value in dataclasses.asdict(found).items() if not math.isnan(value)}
    if model.tokenizer is None:
        raise ValueError('--model has no tokenizer, so questions cannot be asked')
    if given.task == 'choices':
        encode = functools.partial(model.tokenizer.encode, bos=model.tokenizer.adds_bos)
        questions = read_questions(read_rows(given.data, given.limit), given.data)
        examples = read_questions(read_rows(given.examples), given.examples) if given.examples else []
        result: Any = multiple_choice(
            scorer(model),
            encode,
            questions,
            examples,
            shots=given.shots,
            batch_size=given.batch_size,
            length=length,
            progress=report_progress('questions'),
        )
        return dataclasses.asdict(result)
    problems = numbers.read_problems(read_rows(given.data, given.limit), given.data)
    solved = numbers.read_problems(read_rows(given.examples, given.shots), given.examples) if given.examples else []

    progress = report_progress('problems')

    def answer(prompts: list[str]) -> list[str]:
        options = {'max_new_tokens': given.max_new_tokens, 'stop': numbers.STOP, 'batch_size': given.batch_size}
        texts: list[str] = []
        while len(texts) < len(prompts):  # in parts, to show how far it is
            part = prompts[len(texts) : len(texts) + 4 * given.batch_size]
            texts += [result.text for result in model.generate(part, **options)]
            progress(len(texts))
        return texts

    return dataclasses.asdict(numbers.exact_match(answer, problems, solved))


UNITS = {
    'loss': 'nats per token',
    'perplexity': 'per token',
    'kl': 'nats per token, KL(teacher || model)',
    'agreement': 'of tokens have the same likeliest token as the teacher',
    'accuracy': 'of all are right',
    'mean': 'of questions are right',
    'subject_mean': 'the mean over subjects',
}


def as_json(results: dict[str, Any]) -> dict[str, Any]:
    """Results for a file: JSON has no infinity, so a perplexity that overflows is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in results.items()}


def show(results: dict[str, Any]) -> str:
    """Results as aligned lines with their units; a table within them follows below."""
    width = max(map(len, results))
    lines, tables = [], []
    for name, value in results.items():
        if isinstance(value, dict):
            tables += [f'  {key}  {part:.4f}' for key, part in sorted(value.items())]
        elif isinstance(value, float):
            lines.append(f'{name:{width}}  {value:<10.4f}  {UNITS.get(name, "")}'.rstrip())
        else:
            lines.append(f'{name:{width}}  {value:,}')
    return '\n'.join(lines + tables)


def main(argv: list[str]) -> None:
    """Prints the results, and writes them where asked."""
    if len(argv) > 1:
        raise app.UsageError(f'unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        results = evaluate(given)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f'jpt.evaluate: {error}')
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(show(results))
    record = {'model': given.model, 'data': given.data, 'task': given.task, **as_json(results)}
    if given.output:
        Path(given.output).write_text(json.dumps(record, indent=1) + '\n')
    if given.json:
        print(json.dumps(record))


if __name__ == '__main__':
    define_flags()
    app.run(main)
