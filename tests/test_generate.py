"""The generate command as a user types it, and its parts."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import jpt
from jpt.data.tokenizer import Tokenizer
from jpt.generate import as_chat, end_of_turn, prepare, read_prompts, run
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import init

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / 'jpt' / 'assets' / 'quickstart_teacher'
DEFAULTS = {
    'prompt': [], 'prompts': None, 'chat': False, 'system': None, 'max_new_tokens': 8, 'temperature': 0.0, 'top_k': 0,
    'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0, 'seed': 0, 'stop': [], 'batch_size': 4, 'dtype': None,
    'stream': False, 'logprobs': False, 'output': None,
}  # fmt: skip


def given(model, **options):
    """A command line."""
    return SimpleNamespace(model=str(model), **{**DEFAULTS, **options})


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """A Hugging Face directory: a random model with the quickstart's tokenizer."""
    source = shutil.copytree(TOKENIZER, tmp_path_factory.mktemp('tokenizer') / 'files')
    cfg = ModelConfig('llama', 4096, 8, 2, 1, 4, (Segment((LayerKind(Rope(), None, 8),), 1),), 64, tied=True)
    target = tmp_path_factory.mktemp('model') / 'llama'
    jpt.Model(cfg, init(cfg, jax.random.key(1)), Tokenizer.load(source), source).export(target)
    return target


@pytest.fixture(scope='module')
def wanted(directory):
    """What the library says to the prompts of the tests."""
    return jpt.load(directory).generate(['def main(', 'import os'], max_new_tokens=8, batch_size=4)


def test_many_prompts_of_a_file_become_lines_of_answers(directory, wanted, tmp_path, capsys):
    (tmp_path / 'in.txt').write_text('def main(\n\nimport os\n')
    run(given(directory, prompts=str(tmp_path / 'in.txt'), output=str(tmp_path / 'out.jsonl')))
    shown = capsys.readouterr()
    assert shown.out == f'def main({wanted[0].text}\nimport os{wanted[1].text}\n'
    assert re.fullmatch(r'16 tokens in [\d.]+ s \([\d,]+/s, compiling included\)\n', shown.err)
    rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert [row['prompt'] for row in rows] == ['def main(', 'import os']
    for row, result in zip(rows, wanted, strict=True):
        assert row['token_ids'] == result.token_ids
        assert row['prompt_ids'] == result.prompt_ids
        assert (row['text'], row['finish_reason']) == (result.text, 'length')
        assert 'logprobs' not in row


def test_the_command_streams_one_prompt_after_another(directory, wanted):
    command = [sys.executable, '-m', 'jpt.generate', f'--model={directory}', '--max_new_tokens=8', '--stream']
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(
        [*command, '--prompt=def main(', '--prompt=import os'], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f'def main({wanted[0].text}\nimport os{wanted[1].text}\n'


def test_a_chat_is_written_as_the_template_does_and_ends_with_the_turn(directory):
    tokenizer = Tokenizer.load(TOKENIZER)
    end = tokenizer.encode('<|im_end|>')
    text = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    assert as_chat(tokenizer, 'Hi', 'Be brief.') == tokenizer.encode(text)
    assert as_chat(tokenizer, [{'role': 'user', 'content': 'Hi'}], None) == tokenizer.encode(
        text[text.index('\n<') + 1 :]
    )
    assert end_of_turn(tokenizer) == end
    prompts, ends = prepare(jpt.load(directory), given(directory, prompt=['Hi'], chat=True, system='Be brief.'))
    assert prompts == [('Hi', tokenizer.encode(text))]
    assert ends == [tokenizer.eos_id, *end]


def test_files_of_prompts_are_texts_or_messages(tmp_path):
    messages = [{'role': 'user', 'content': 'a'}]
    (tmp_path / 'a.jsonl').write_text(json.dumps({'prompt': 'x\ny'}) + '\n' + json.dumps({'messages': messages}) + '\n')
    assert read_prompts(str(tmp_path / 'a.jsonl')) == ['x\ny', messages]
    (tmp_path / 'b.jsonl').write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(ValueError, match=r'b.jsonl: row 2: expected "prompt" .*; keys: text'):
        read_prompts(str(tmp_path / 'b.jsonl'))
    (tmp_path / 'c.txt').write_text('\n')
    with pytest.raises(ValueError, match=r'c.txt holds no prompts'):
        read_prompts(str(tmp_path / 'c.txt'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, 'give either --prompt'),
        ({'prompt': ['x'], 'prompts': 'file'}, 'give either --prompt'),
        ({'prompt': ['x'], 'system': 'y'}, '--system needs --chat'),
        ({'prompt': ['x'], 'temperature': -1.0}, 'temperature=-1.0: expected a number of at least 0'),
        ({'prompt': ['x' * 100]}, r'prompts\[0\] has \d+ tokens, and max_new_tokens is 8: together at most 64'),
    ],
)
def test_a_command_line_that_asks_for_nothing_sensible_is_told_so(directory, options, message):
    with pytest.raises(ValueError, match=message):
        run(given(directory, **options))


def test_a_wrong_path_ends_with_one_line(tmp_path):
    command = [sys.executable, '-m', 'jpt.generate', f'--model={tmp_path / "none"}', '--prompt=x']
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith('jpt.generate: ')
    assert 'Traceback' not in done.stderr
    assert str(tmp_path / 'none') in done.stderr


def test_a_real_model_tells_its_story_up_to_a_stop_string(shared_data, tmp_path, capsys):
    folder = shared_data / 'models' / 'stories260K'
    golden = json.loads((folder / 'golden.json').read_text())['greedy_from_bos_text']
    options = {'prompt': [''], 'stop': ['too high', 'never said'], 'max_new_tokens': 256, 'stream': True}
    run(given(folder, **options, logprobs=True, output=str(tmp_path / 'out.jsonl')))
    story = golden[: golden.index('too high')]
    assert capsys.readouterr().out == story + '\n'
    (row,) = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert (row['text'], row['finish_reason']) == (story, 'stop')
    tokenizer = Tokenizer.load(folder)
    assert 'too high' in tokenizer.decode(row['token_ids'])
    assert 'too high' not in tokenizer.decode(row['token_ids'][:-1])
    assert len(row['logprobs']) == len(row['token_ids'])
