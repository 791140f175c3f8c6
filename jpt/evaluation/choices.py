"""Multiple choice: the letter of the right answer must be the likeliest of the letters (MMLU, Hendrycks et al.)."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jpt.evaluation.perplexity import Score
from jpt.evaluation.windows import batches_of

LETTERS = 'ABCDEFGHIJ'


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its choices and the index of the right one."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Right answers, in all and by subject; `mean` is over questions, `subject_mean` over subjects."""

    questions: int
    right: int
    mean: float
    subject_mean: float
    by_subject: dict[str, float]


def read_questions(rows: Iterable[Mapping[str, Any]], place: str) -> list[Question]:
    """Questions from rows with subject, question, choices and answer (a letter).

    Raises:
        ValueError: a row that is not such a question, by its number.
    """
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            choices = tuple(row['choices'])
            answer = LETTERS.index(row['answer'])
            if not answer < len(choices) <= len(LETTERS):
                raise IndexError(row['answer'])
            questions.append(Question(row.get('subject', ''), row['question'], choices, answer))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f'{place}, row {number}: expected question, choices and the letter of one of them as answer ({error!r})'
            ) from None
    return questions


def ask(question: Question) -> str:
    """The question as MMLU writes it, up to the letter of the answer."""
    lines = [question.text]
    lines += [f'{letter}. {choice}' for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return '\n'.join([*lines, 'Answer:'])


def prompt_of(question: Question, examples: Sequence[Question]) -> str:
    """A question after solved examples of its subject."""
    subject = question.subject.replace('_', ' ')
    head = f'The following are multiple choice questions (with answers) about {subject}.\n\n' if subject else ''
    solved = [f'{ask(example)} {LETTERS[example.answer]}\n\n' for example in examples]
    return head + ''.join(solved) + ask(question)


def multiple_choice(
    score: Score,
    encode: Callable[[str], list[int]],
    questions: Sequence[Question],
    examples: Sequence[Question] = (),
    *,
    shots: int = 5,
    batch_size: int,
    length: int,
    progress: Callable[[int], None] = lambda questions: None,
) -> Accuracy:
    """Accuracy on questions, each after `shots` examples of its own subject.

    The prompt and each letter are tokenized together, ' A' after 'Answer:'; a prompt that does not fit into `length`
    loses whole examples from the front.

    Raises:
        ValueError: a question that does not fit even alone.
    """
    rows: list[tuple[int, np.ndarray, int]] = []
    for number, question in enumerate(questions):
        own = [example for example in examples if example.subject == question.subject][:shots]
        rows += _rows(number, question, own, encode, length)
    best = [(-np.inf, -1)] * len(questions)
    taken = [0] * len(questions)
    for batch, owner in batches_of(rows, batch_size, length):
        log_probs = np.sum(np.asarray(score(batch).log_prob, np.float64) * batch.loss_mask, axis=1)
        for number, value in zip(owner, log_probs, strict=True):
            if number >= 0:
                best[number] = max(best[number], (float(value), -taken[number]))
                taken[number] += 1
        progress(int(owner.max()))
    right = [-choice == question.answer for (_, choice), question in zip(best, questions, strict=True)]
    subjects: dict[str, list[bool]] = {}
    for question, hit in zip(questions, right, strict=True):
        subjects.setdefault(question.subject, []).append(hit)
    by_subject = {name: float(np.mean(hits)) for name, hits in subjects.items()}
    return Accuracy(
        len(right), sum(right), float(np.mean(right)), float(np.mean(list(by_subject.values()))), by_subject
    )


def _rows(
    number: int, question: Question, examples: list[Question], encode: Callable[[str], list[int]], length: int
) -> list[tuple[int, np.ndarray, int]]:
    while True:
        prompt = prompt_of(question, examples)
        start = len(encode(prompt))
        texts = [encode(f'{prompt} {letter}') for letter in LETTERS[: len(question.choices)]]
        longest = max(len(text) for text in texts)
        if longest <= length + 1:
            # Only the tokens after the prompt count; 'Answer:' and ' A' do not merge into one token.
            return [(number, np.asarray(text, np.int32), min(start, len(text) - 1) - 1) for text in texts]
        if not examples:
            raise ValueError(f'question {number + 1} has {longest} tokens: expected at most {length + 1}')
        examples = examples[1:]
