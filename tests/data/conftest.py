"""A tokenizer of 300 byte-level entries, from the golden file that transformers wrote with it."""

import json
import pathlib
from collections.abc import Callable

import pytest
from hypothesis import settings

from jpt.data.tokenizer import Tokenizer

# The same examples every time, and no limit on time: the machine may be busy.
settings.register_profile('data', max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile('data')

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'chat.json').read_text(encoding='utf-8'))
TURNS = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope='session')
def golden() -> dict:
    return GOLDEN


@pytest.fixture(scope='session')
def tokenizer_folder(tmp_path_factory) -> pathlib.Path:
    """A model folder: bos 3, eos 0 (which ends turns too), pad 1, and a template of turns without generation marks."""
    folder = tmp_path_factory.mktemp('tokenizer')
    (folder / 'tokenizer.json').write_text(json.dumps(GOLDEN['tokenizer']), encoding='utf-8')
    config = {'bos_token': '<|bos|>', 'eos_token': '<|end|>', 'pad_token': '<|pad|>', 'chat_template': TURNS}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    return folder


@pytest.fixture(scope='session')
def write_tokenizer() -> Callable[..., pathlib.Path]:
    """Makes a folder with the golden tokenizer.json, some fields changed, and the config that is given."""

    def write(folder: pathlib.Path, config: dict | None = None, **changes: object) -> pathlib.Path:
        folder.mkdir(exist_ok=True)
        (folder / 'tokenizer.json').write_text(json.dumps(GOLDEN['tokenizer'] | changes), encoding='utf-8')
        if config is not None:
            (folder / 'tokenizer_config.json').write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope='session')
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
