"""Exact answers to word problems (GSM8K, Cobbe et al. 2021): the last number of a text must be the answer."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r'-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+')
MARK = '####'  # before the answer of a solution, as GSM8K writes it


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem, its worked solution and the number that answers it."""

    question: str
    solution: str
    answer: Decimal


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """How many texts end in the right number, and how many hold a number at all."""

    problems: int
    right: int
    answered: int
    accuracy: float


def parse_number(text: str) -> Decimal | None:
    """A number as written, with or without a dollar sign and thousands separators."""
    try:
        return Decimal(text.replace(',', '').replace('$', '').rstrip('.'))
    except InvalidOperation:
        return None


def final_number(text: str) -> Decimal | None:
    """The number after the last '####', or else the last number of the text."""
    tail = text.rsplit(MARK, 1)[1] if MARK in text else text
    found = NUMBER.findall(tail)
    if not found:
        return None
    return parse_number(found[0] if MARK in text else found[-1])


def read_problems(rows: Iterable[Mapping[str, Any]], place: str) -> list[Problem]:
    """Problems from rows with question and answer, the number after '####'.

    Raises:
        ValueError: a row that is not such a problem, by its number.
    """
    problems = []
    for number, row in enumerate(rows, start=1):
        solution = row.get('answer')
        answer = final_number(solution) if isinstance(solution, str) and MARK in solution else None
        if answer is None or not isinstance(row.get('question'), str):
            raise ValueError(f'{place}, row {number}: expected question, and answer with a number after {MARK}')
        problems.append(Problem(row['question'], str(solution), answer))
    return problems


def prompt_of(problem: Problem, examples: Sequence[Problem]) -> str:
    """A problem after solved examples."""
    solved = [f'Question: {example.question}\nAnswer: {example.solution}\n\n' for example in examples]
    return ''.join(solved) + f'Question: {problem.question}\nAnswer:'


STOP = ('\nQuestion:', '\n\nQuestion')


def exact_match(
    generate: Callable[[list[str]], list[str]], problems: Sequence[Problem], examples: Sequence[Problem] = ()
) -> ExactMatch:
    """Accuracy of generated answers; `generate` continues prompts, and should stop at STOP."""
    texts = generate([prompt_of(problem, examples) for problem in problems])
    found = [final_number(text) for text in texts]
    right = sum(number == problem.answer for number, problem in zip(found, problems, strict=True))
    answered = sum(number is not None for number in found)
    return ExactMatch(len(problems), right, answered, right / max(len(problems), 1))
