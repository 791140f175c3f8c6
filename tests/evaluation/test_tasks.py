"""Multiple choice and exact numbers, with models that are known to be right or wrong."""

import json
import lzma
from decimal import Decimal

import numpy as np
import pytest
from letters import encode, likes

from jpt.evaluation.choices import Question, ask, multiple_choice, prompt_of, read_questions
from jpt.evaluation.numbers import Problem, exact_match, final_number, read_problems
from jpt.evaluation.rows import read_rows

SUM = Question('sums', 'What is 1 + 1?', ('1', '2', '3', '4'), 1)
LAST = Question('letters', 'Which is last?', ('a', 'b'), 1)


def test_prompts_are_written_as_mmlu_does():
    assert ask(SUM) == 'What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:'
    prompt = prompt_of(SUM, [LAST])
    assert prompt.startswith('The following are multiple choice questions (with answers) about sums.\n\nWhich is last?')
    assert 'B. b\nAnswer: B\n\nWhat is 1 + 1?' in prompt


def test_the_likeliest_letter_is_the_answer():
    right = multiple_choice(likes('B'), encode, [SUM, LAST], batch_size=4, length=200)
    assert (right.questions, right.right, right.mean) == (2, 2, 1.0)
    assert right.by_subject == {'sums': 1.0, 'letters': 1.0}
    wrong = multiple_choice(likes('A'), encode, [SUM, LAST], batch_size=3, length=200)
    assert wrong.right == 0


def test_examples_that_do_not_fit_are_left_out_and_a_question_that_does_not_is_named():
    room = len(encode(prompt_of(SUM, []))) + 3
    kept = multiple_choice(likes('B'), encode, [SUM], [SUM, SUM], shots=2, batch_size=1, length=room)
    assert kept.right == 1
    with pytest.raises(ValueError, match='question 1 has'):
        multiple_choice(likes('B'), encode, [SUM], batch_size=1, length=10)


@pytest.mark.parametrize(
    'row', [{}, {'question': 'x', 'choices': ['1'], 'answer': 'B'}, {'question': 'x', 'answer': 'A'}]
)
def test_broken_questions_are_named(row):
    good = {'question': 'q', 'choices': ['1', '2'], 'answer': 'A'}
    with pytest.raises(ValueError, match=r'f\.jsonl, row 2'):
        read_questions([good, row], 'f.jsonl')


@pytest.mark.parametrize(
    ('text', 'number'),
    [
        ('so 3 + 4 = 7.', '7'),
        ('She pays $1,234.50 in all', '1234.50'),
        ('first 5 then\n#### -12\nand 99', '-12'),
        ('#### 1,000', '1000'),
        ('no number', None),
        ('####', None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_numbers_not_texts():
    problems = [
        Problem('a', '#### 18', Decimal(18)),
        Problem('b', '#### 5', Decimal(5)),
        Problem('c', '#### 1', Decimal(1)),
    ]
    result = exact_match(lambda prompts: ['it is 18.0', 'it is 6', 'nothing'], problems)
    assert (result.right, result.answered, result.problems) == (1, 2, 3)


def test_gsm8k_and_mmlu_are_read_whole(shared_data):
    """Published sizes of the two test sets; and GSM8K's own graded model solutions agree with our reading of them."""
    problems = read_problems(read_rows(shared_data / 'math' / 'gsm8k_test.jsonl.xz'), 'gsm8k')
    assert len(problems) == 1319
    questions = read_questions(read_rows(shared_data / 'tasks' / 'mmlu_test.jsonl.xz'), 'mmlu')
    assert len(questions) == 14042
    assert len({question.subject for question in questions}) == 57
    with lzma.open(shared_data / 'math' / 'gsm8k_example_model_solutions.jsonl.xz', 'rt') as file:
        rows = [json.loads(line) for line in file]
    agree = [
        (final_number(row['175b_finetuning']['solution']) == final_number(row['ground_truth']))
        == row['175b_finetuning']['is_correct']
        for row in rows
    ]
    assert np.mean(agree) > 0.99


def test_rows_name_the_line_that_is_broken(tmp_path):
    path = tmp_path / 'x.jsonl'
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_rows(path, limit=1) == [{'a': 1}]
    assert len(read_rows(path)) == 2
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r'x\.jsonl:2: expected a JSON object'):
        read_rows(path)
