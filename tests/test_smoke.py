"""The shortest way through everything: train a little, load, generate, export, load again. Run on every Python."""

import sys

import numpy as np
import pytest

import jpt
from jpt.training.run import train_model

sys.path.insert(0, __file__.rsplit('/', 1)[0] + '/training')
from tiny import settings


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A trained model, and the folder of its run."""
    folder = tmp_path_factory.mktemp('smoke')
    return train_model(settings(folder, steps=2), folder / 'run'), folder / 'run'


def test_train_load_generate_export(run, tmp_path):
    trained, workdir = run
    model = jpt.load(workdir)
    tokens = np.arange(10).reshape(2, 5)
    np.testing.assert_array_equal(model.logits(tokens), trained.logits(tokens))
    results = model.generate(['def add(a, b):', 'return'], max_new_tokens=5, logprobs=True)
    assert [len(result.token_ids) for result in results] == [5, 5]
    model.export(tmp_path / 'hf')
    again = jpt.load(tmp_path / 'hf')
    np.testing.assert_array_equal(again.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize('tokens', [[[4096]], [[-1]], [1, 2]])
def test_impossible_tokens_are_refused(run, tokens):
    with pytest.raises(ValueError, match='expected'):
        run[0].logits(tokens)
