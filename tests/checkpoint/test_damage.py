"""Every file of a checkpoint, flipped, truncated, emptied or removed: an error that names it, or nothing is lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jpt.checkpoint.about import is_checkpoint
from jpt.checkpoint.manager import CheckpointManager
from jpt.checkpoint.manifest import DamagedCheckpoint
from jpt.checkpoint.model_dir import StoredSource, save_model
from jpt.models.families import config_from_hf
from jpt.models.transformer import init

ASSETS = Path(__file__).resolve().parents[2] / 'jpt' / 'assets' / 'quickstart_teacher'
# What Orbax adds beside the items; jpt reads none of it.
UNREAD = ('_CHECKPOINT_METADATA', 'commit_success.txt', 'manifest/commit_success.txt')


def damages(raw: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What can happen to a file's content; None: it is gone."""
    for place in sorted({0, len(raw) // 3, len(raw) // 2, len(raw) - 1}) if raw else ():
        yield f'bit of byte {place} flipped', raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :]
    if raw:
        yield 'truncated', raw[: len(raw) // 2]
        yield 'emptied', b''
    yield 'longer', raw + b'\0'
    yield 'removed', None


def damaged(directory: Path) -> Iterator[tuple[str, str]]:
    """Damages one file after the other, and puts it back; its name in the checkpoint, and how."""
    for path in sorted(path for path in directory.rglob('*') if path.is_file()):
        raw = path.read_bytes()
        for how, content in damages(raw):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            yield path.relative_to(directory).as_posix(), how
            path.write_bytes(raw)


def make_state() -> dict[str, Any]:
    random = np.random.default_rng(0)
    mesh = jax.make_mesh((8,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('a'))
    return {
        'w': jax.device_put(random.standard_normal((64, 100)).astype(np.float32), rows),
        'b': random.standard_normal(3).astype(ml_dtypes.bfloat16),
        'step': 5,
    }


def assert_restored(found: dict[str, Any]) -> None:
    for name, value in make_state().items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp('run')
    with CheckpointManager(directory, assets=ASSETS, config={'lr': 0.1}, best_metric='loss') as manager:
        manager.save(5, make_state(), data={'next': 6}, metrics={'loss': 2.5})
    return directory


def test_no_damage_to_a_training_step_goes_unnoticed(run: Path) -> None:
    items = set()
    with CheckpointManager(run, assets=ASSETS) as manager:
        for name, how in damaged(run / '5'):
            if name in UNREAD:
                assert_restored(manager.restore().state)
                continue
            items.add(name.split('/')[0])
            with pytest.raises(DamagedCheckpoint) as error:
                manager.restore()
            assert name.removeprefix('manifest/') in str(error.value), (name, how)
        assert_restored(manager.restore().state)
    assert items == {'assets', 'config', 'data', 'manifest', 'metrics', 'model', 'state'}


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', 'metrics/metrics', 'model/model.json', 'state/_METADATA'])
def test_a_run_that_is_opened_anew_names_the_damage_too(run: Path, name: str) -> None:
    """Orbax looks into some files before anything is verified."""
    path = run / '5' / name
    raw = path.read_bytes()
    for _, content in damages(raw):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        if name == '_CHECKPOINT_METADATA':
            with CheckpointManager(run, best_metric='loss') as manager:
                assert_restored(manager.restore().state)
            continue
        with pytest.raises(DamagedCheckpoint, match=name), CheckpointManager(run, best_metric='loss') as manager:
            manager.restore()
    path.write_bytes(raw)


def test_no_damage_to_a_model_goes_unnoticed(tmp_path: Path) -> None:
    cfg = config_from_hf(
        {
            'model_type': 'llama',
            'vocab_size': 8,
            'hidden_size': 8,
            'intermediate_size': 8,
            'num_hidden_layers': 1,
            'num_attention_heads': 2,
            'max_position_embeddings': 8,
        }
    )
    save_model(tmp_path / 'model', cfg, init(cfg, jax.random.key(0)), ASSETS)
    for name, how in damaged(tmp_path / 'model'):
        if name in UNREAD:
            StoredSource(tmp_path / 'model')
            continue
        whole = is_checkpoint(tmp_path / 'model')
        with pytest.raises(DamagedCheckpoint if whole else FileNotFoundError) as error:
            StoredSource(tmp_path / 'model')
        assert name.removeprefix('manifest/') in str(error.value) or not whole, (name, how)
