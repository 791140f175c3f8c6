"""Weights & Biases, on a stand-in for its package: what it is told, and that a resumed run goes on with the same id."""

import importlib.machinery
import sys
import types

import pytest

from jpt.training.writers import WeightsAndBiases


@pytest.fixture
def wandb(monkeypatch):
    """A module that keeps what it was told."""
    module = types.ModuleType('wandb')
    module.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    module.inits, module.rows, module.ended = [], [], []

    def init(**arguments):
        module.inits.append(arguments)
        return types.SimpleNamespace(
            log=lambda row, step: module.rows.append((step, row)), finish=lambda: module.ended.append(True)
        )

    module.init = init
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return module


def test_rows_and_resuming(tmp_path, wandb):
    for step in (1, 2):
        writer = WeightsAndBiases('project', tmp_path, {'steps': 2})
        writer.write(step, {'loss': 1.0 / step})
        writer.close()
    assert wandb.rows == [(1, {'loss': 1.0}), (2, {'loss': 0.5})]
    assert len(wandb.ended) == 2
    first, second = wandb.inits
    assert first == second  # the id is kept in the workdir
    assert (first['project'], first['resume'], first['dir']) == ('project', 'allow', str(tmp_path))
    assert first['config'] == {'steps': 2}
    assert len(first['id']) == 32
