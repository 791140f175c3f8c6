"""What a run exports is of its last step: written once, anew where the run goes on, and never over something else."""

import json

import numpy as np
import pytest
from tiny import ARCHITECTURE, settings

from jpt.model import load
from jpt.training.run import check_results, needed, train_model

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


def test_a_result_is_written_where_it_is_missing_or_of_another_step(tmp_path):
    result = tmp_path / 'model'
    assert needed(result, 5)
    assert needed(result, 5)  # killed before it was there
    result.mkdir()
    (result / 'file').write_text('of step 5')
    assert not needed(result, 5)
    check_results(tmp_path)
    assert needed(result, 6)
    assert not result.exists()


def test_what_a_run_did_not_write_is_left_alone(tmp_path):
    kept = tmp_path / 'run' / 'model' / 'kept'
    kept.parent.mkdir(parents=True)
    kept.write_text('of someone')
    with pytest.raises(ValueError, match=r'run/model is not of this run: expected nothing there'):
        train_model(adapted(tmp_path, 1), tmp_path / 'run')
    assert kept.read_text() == 'of someone'
