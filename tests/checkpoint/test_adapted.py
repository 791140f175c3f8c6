"""A PEFT adapter opened by its directory: the model that it names, with the adapter merged into it."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import jpt
from jpt.checkpoint.opening import SHIPPED, base_model, open_model
from jpt.checkpoint.safetensors import load_file
from jpt.convert import convert
from jpt.models.names import to_hf

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.fixture
def adapter(tmp_path):
    """A function (name, base): the golden adapter of that name, beside what it names as its base."""

    def make(name: str, base: str | None) -> pathlib.Path:
        directory = tmp_path / 'adapter'
        shutil.copytree(GOLDEN / 'peft' / name, directory)
        path = directory / 'adapter_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | {'base_model_name_or_path': base}))
        return directory

    return make


@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_weights_are_those_that_peft_merges(name, adapter):
    base = GOLDEN / 'models' / name
    model = jpt.load(adapter(name, str(base)))
    golden = np.load(GOLDEN / 'peft' / name / 'golden.npz')
    plain = load_file(base / 'model.safetensors')
    adapted = {key for key in golden.files if key.startswith('merged/')}
    weights = to_hf(model.config, model.params)
    for weight, values in weights.items():
        expected = golden[f'merged/{weight}'] if f'merged/{weight}' in adapted else plain[weight]
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6, err_msg=weight)
    assert {f'merged/{weight}' for weight in weights} > adapted
    assert model.assets == base


def test_a_base_beside_the_adapter_is_found_and_a_conversion_writes_the_merged_model(adapter, tmp_path):
    directory = adapter('llama', '../base')
    shutil.copytree(GOLDEN / 'models' / 'llama', tmp_path / 'base')
    convert(directory, tmp_path / 'out', 'hf')
    golden = np.load(GOLDEN / 'peft' / 'llama' / 'golden.npz')
    written = load_file(tmp_path / 'out' / 'model.safetensors')
    for key in (key for key in golden.files if key.startswith('merged/')):
        np.testing.assert_allclose(written[key.removeprefix('merged/')], golden[key], rtol=1e-6, atol=1e-6)


def test_a_base_that_is_not_here_is_named(adapter):
    with pytest.raises(FileNotFoundError, match=r"adapter of 'somebody/some-7b', which is no directory here"):
        open_model(adapter('llama', 'somebody/some-7b'))


@pytest.mark.parametrize(('base', 'message'), [(None, 'base_model_name_or_path=None'), ('../adapter', 'adapter too')])
def test_an_adapter_without_a_model_is_an_error(base, message, adapter):
    with pytest.raises(ValueError, match=message):
        open_model(adapter('llama', base))


def test_a_base_is_looked_for_beside_the_adapter_then_here_then_among_the_shipped(adapter, tmp_path, monkeypatch):
    directory = adapter('llama', 'quickstart')
    here = tmp_path / 'here'
    monkeypatch.chdir(tmp_path)
    assert base_model(directory) == SHIPPED['quickstart']
    for folder, expected in ((here, pathlib.Path('quickstart')), (directory, directory / 'quickstart')):
        (folder / 'quickstart').mkdir(parents=True)
        monkeypatch.chdir(here)
        assert base_model(directory) == expected


def test_a_tokenizer_beside_the_adapter_is_taken(adapter, tokenizer_dir):
    base = GOLDEN / 'models' / 'llama'
    directory = adapter('llama', str(base))
    (directory / 'tokenizer_config.json').write_text('{}')  # no tokenizer yet
    assert open_model(directory)[1:] == (base, base)
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    assert open_model(directory)[1:] == (directory, base)
    assert jpt.load(directory).tokenizer.source == str(directory)
