"""What a run exports is of its last step: written once, anew where the run goes on, and never over something else."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from tiny import ARCHITECTURE, settings

from jpt.model import load
from jpt.training.job import make_job
from jpt.training.run import base_name, beside, check_results, needed, swap_in, train_model
from jpt.training.settings import CheckpointConfig

FILES = ('model/model.safetensors', 'adapter/adapter_model.safetensors')


def adapted(folder, steps):
    changes = {'lora': {'rank': 2}, 'eval': {}, 'schedule': {'kind': 'constant', 'lr': 1e-2}, 'steps': steps}
    export = {'every': 100, 'export': True}
    return settings(folder, model={'architecture': ARCHITECTURE}, checkpoint=export, **changes)


def test_a_run_that_goes_on_exports_anew(tmp_path):
    workdir, contents = tmp_path / 'run', []
    for steps in (1, 2, 2):
        model = train_model(adapted(tmp_path, steps), workdir)
        assert json.loads((workdir / 'results.json').read_text()) == {'adapter': steps, 'model': steps}
        contents.append([(workdir / name).read_bytes() for name in FILES])
        tokens = np.arange(8).reshape(1, 8)
        np.testing.assert_allclose(load(workdir / 'model').logits(tokens), model.logits(tokens), atol=1e-5)
    assert contents[0][0] != contents[1][0]
    assert contents[0][1] != contents[1][1]
    assert contents[1] == contents[2]
    assert 'made from' not in (workdir / 'model' / 'README.md').read_text()  # random weights, another's tokenizer
    assert not (workdir / 'checkpoints' / '2' / 'assets' / 'README.md').exists()


def test_an_adapter_names_its_base_and_no_adapter_as_one(tmp_path, monkeypatch):
    golden = pathlib.Path(__file__).parents[1] / 'golden'
    shutil.copytree(golden / 'peft' / 'llama', tmp_path / 'adapter')
    monkeypatch.chdir(tmp_path)
    config = settings(tmp_path, model={'path': 'adapter'}, lora={'rank': 2})
    assert base_name(config) == str(tmp_path / 'adapter')
    with pytest.raises(ValueError, match=r'config\.model\.path=adapter: a PEFT adapter, and config\.lora would train'):
        make_job(config)


def test_a_result_is_written_where_it_is_missing_or_of_another_step(tmp_path):
    result = tmp_path / 'model'
    for step in (5, 6):
        assert needed(result, step)
        write(beside(result), step)
        assert needed(result, step)  # killed before it had its name
        assert not beside(result).exists()
        assert result.exists() == (step == 6)  # the old one stays until there is a new one
        write(beside(result), step)
        swap_in(result, step)
        assert not needed(result, step)
        assert [path.read_text() for path in tmp_path.glob('model*/file')] == [f'of step {step}']
        check_results(adapted(tmp_path, 1), tmp_path)


def write(directory, step):
    directory.mkdir()
    (directory / 'file').write_text(f'of step {step}')


def test_only_the_places_that_this_run_writes_to_must_be_free(tmp_path):
    config = adapted(tmp_path, 1)
    (tmp_path / 'adapter').mkdir()
    check_results(dataclasses.replace(config, lora=None), tmp_path)
    with pytest.raises(ValueError, match='adapter is not of this run'):
        check_results(config, tmp_path)
    (tmp_path / 'adapter').rename(tmp_path / 'model')
    check_results(dataclasses.replace(config, checkpoint=CheckpointConfig(export=False)), tmp_path)
    with pytest.raises(ValueError, match='model is not of this run'):
        check_results(config, tmp_path)


@pytest.mark.parametrize('content', ['', '{"model": 3', '[1]', '{"model": "three"}'])
def test_a_damaged_list_of_results_is_named(tmp_path, content):
    (tmp_path / 'results.json').write_text(content)
    with pytest.raises(ValueError, match=r'results\.json is damaged'):
        check_results(adapted(tmp_path, 1), tmp_path)


def test_what_a_run_did_not_write_is_left_alone(tmp_path):
    kept = tmp_path / 'run' / 'model' / 'kept'
    kept.parent.mkdir(parents=True)
    kept.write_text('of someone')
    with pytest.raises(ValueError, match=r'run/model is not of this run: expected nothing there'):
        train_model(adapted(tmp_path, 1), tmp_path / 'run')
    assert kept.read_text() == 'of someone'
