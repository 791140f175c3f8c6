"""Checkpoints of training runs: what is kept, exact restores onto any mesh, and every mismatch named."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpt.checkpoint.manager import CheckpointManager, CheckpointMismatch
from jpt.checkpoint.manifest import DamagedCheckpoint
from jpt.models.config import LayerKind, ModelConfig, Segment

CONFIG = ModelConfig('llama', 11, 8, 4, 2, 2, (Segment((LayerKind(mlp_width=12),), 3),), 32)


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    codes: Any
    scale: Any
    signed: bool = dataclasses.field(metadata={'static': True})


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def on(mesh: jax.sharding.Mesh, *axes: str | None) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def make_state(step: int, mesh: jax.sharding.Mesh) -> State:
    """A state with everything that occurs in one: sharded leaves of several dtypes, None, lists, codes, a key."""
    values = np.random.default_rng(step).standard_normal((3, 8, 4))
    moments = values.view(np.uint8)[..., :8].copy()
    return State(
        step=jax.device_put(np.int32(step), on(mesh)),
        params={'layers': [[{'w': jax.device_put(values.astype(ml_dtypes.bfloat16), on(mesh, None, 'a', 'b'))}, None]]},
        opt_state=(
            Codes(jax.device_put(moments, on(mesh, None, 'a')), jax.device_put(np.ones(3, np.float32), on(mesh)), True),
            [None, jax.device_put(values[0].astype(ml_dtypes.float8_e5m2), on(mesh, 'b'))],
            (),
            step,
        ),
        ema=None,
        key=jax.device_put(jax.random.key(step), on(mesh)),
    )


def abstract(state: State) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if hasattr(x, 'shape') else x, state
    )


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(left, int):
            assert left == right
            continue
        assert left.dtype == right.dtype
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 3 and 7, for the tests that only read."""
    directory = tmp_path_factory.mktemp('run')
    with CheckpointManager(directory, model=CONFIG, config={'lr': 0.1}) as manager:
        for step in (3, 7):
            manager.save(step, make_state(step, mesh_of(4, 2)), data={'next': step + 1})
    return directory


@pytest.mark.parametrize('shape', [(4, 2), (2, 4), (8, 1), (1, 1)])
def test_restores_bit_for_bit_onto_any_mesh(run: Path, shape: tuple[int, int]) -> None:
    mesh = jax.make_mesh(
        shape, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[: shape[0] * shape[1]]
    )
    target = make_state(0, mesh)
    with CheckpointManager(run, model=CONFIG) as manager:
        restored = manager.restore(abstract(target))
    assert (restored.step, restored.data, restored.config, restored.model) == (7, {'next': 8}, {'lr': 0.1}, CONFIG)
    assert_equal(restored.state, make_state(7, mesh))
    for left, right in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
        assert getattr(left, 'sharding', None) == getattr(right, 'sharding', None)


def test_an_older_step_and_no_target(run: Path) -> None:
    with CheckpointManager(run) as manager:
        restored = manager.restore(step=3)
    expected = make_state(3, mesh_of(4, 2))
    weights = restored.state['params']['layers']['0']['0']['w']
    assert isinstance(weights, np.ndarray)
    np.testing.assert_array_equal(weights, np.asarray(expected.params['layers'][0][0]['w']))
    assert restored.state['opt_state']['3'] == 3
    assert restored.metrics == {}


def test_every_mismatch_is_named_and_nothing_is_cast(run: Path) -> None:
    target = abstract(make_state(0, mesh_of(4, 2)))
    target.params['layers'][0][0]['w'] = jax.ShapeDtypeStruct((3, 8, 4), jnp.float32, sharding=on(mesh_of(4, 2)))
    target = target._replace(
        step=jax.ShapeDtypeStruct((1,), jnp.int32),
        ema={'w': jax.ShapeDtypeStruct((2,), jnp.float32)},
        opt_state=(dataclasses.replace(target.opt_state[0], signed=False), [None, None], (), 0.5),
        key=jax.random.key(0, impl='rbg'),
    )
    with CheckpointManager(run) as manager, pytest.raises(CheckpointMismatch) as caught:
        manager.restore(target)
    lines = {line.strip() for line in str(caught.value).splitlines()}
    assert lines >= {
        'params/layers/0.0/w: bfloat16[3, 8, 4] in the checkpoint, expected float32[3, 8, 4]',
        'step: int32[] in the checkpoint, expected int32[1]',
        'ema/w: not in the checkpoint, expected float32[2]',
        'opt_state/1.1: float8_e5m2[8, 4] in the checkpoint, not expected',
        'opt_state/0/signed: True in the checkpoint, expected False',
        'opt_state/3: python int[] in the checkpoint, expected python float[]',
        'key: key<fry>[] in the checkpoint, expected key<rbg>[]',
    }


def test_another_model_is_refused_by_field(run: Path) -> None:
    other = dataclasses.replace(CONFIG, vocab_size=12)
    with (
        CheckpointManager(run, model=other) as manager,
        pytest.raises(CheckpointMismatch, match=r'model\.vocab_size: 11 in'),
    ):
        manager.restore()


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with CheckpointManager(tmp_path / 'run', assets=tokenizer_dir) as manager:
        manager.save(1, {'x': np.ones(2)})
    stored = tmp_path / 'run' / '1' / 'assets' / 'tokenizer.json'
    assert stored.read_bytes() == (tokenizer_dir / 'tokenizer.json').read_bytes()
    (tokenizer_dir / 'tokenizer.json').write_text(stored.read_text().replace('"f"', '"g"'))
    with (
        CheckpointManager(tmp_path / 'run', assets=tokenizer_dir) as manager,
        pytest.raises(CheckpointMismatch, match='tokenizer: '),
    ):
        manager.restore()


def test_what_is_absent_is_said_so(tmp_path: Path, run: Path) -> None:
    with (
        CheckpointManager(tmp_path / 'empty') as manager,
        pytest.raises(FileNotFoundError, match=r'no checkpoint; there are \[\]'),
    ):
        manager.restore()
    with CheckpointManager(run) as manager:
        assert (manager.all_steps(), manager.latest_step(), manager.best_step()) == ([3, 7], 7, None)
        with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 5; there are \[3, 7\]'):
            manager.restore(step=5)
        with pytest.raises(ValueError, match='step 7 is saved already'):
            manager.save(7, {'x': np.ones(2)})


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / 'run', best_metric='loss') as manager:
        with pytest.raises(TypeError, match="a/name: a checkpoint holds arrays and numbers, not str 'text'"):
            manager.save(1, {'a': {'name': 'text'}})
        with pytest.raises(ValueError, match=r"metrics \['accuracy'\]: expected 'loss'"):
            manager.save(1, {'a': np.ones(1)}, metrics={'accuracy': 1.0})
    with pytest.raises(ValueError, match="best_mode='least': expected 'min' or 'max'"):
        CheckpointManager(tmp_path / 'run', best_mode='least')  # what a config may say


@pytest.mark.parametrize(('mode', 'best'), [('min', 2), ('max', 3)])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, mode: Any, best: int) -> None:
    losses = {1: 3.0, 2: 0.5, 3: 9.0, 4: float('nan'), 5: 2.0, 6: None, 7: 1.0}
    with CheckpointManager(tmp_path, max_to_keep=2, best_metric='loss', best_mode=mode) as manager:
        for step, loss in losses.items():
            manager.save(step, {'x': np.full(2, step)}, metrics=None if loss is None else {'loss': loss})
        manager.wait()
        assert manager.all_steps() == [best, 6, 7]
        assert manager.best_step() == best
        assert manager.restore(step=best).metrics == {'loss': losses[best]}
    with CheckpointManager(tmp_path, best_metric='loss', best_mode=mode) as again:
        assert again.best_step() == best


def test_arrays_may_be_donated_after_save_returns(tmp_path: Path) -> None:
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((512, 1024))
    with CheckpointManager(tmp_path, max_to_keep=None) as manager:
        for step in range(4):
            manager.save(step, {'x': state})
            state = add(add(state))
        manager.wait()
        for step in range(4):
            assert np.all(manager.restore(step=step).state['x'] == 2 * step)


def damage(directory: Path, how: str) -> str:
    """Damages the largest file of a step; its name."""
    victim = max((directory / 'state').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 4
    if how == 'truncated':
        raw = raw[:-1]
    victim.unlink()
    if how != 'missing':
        victim.write_bytes(bytes(raw))
    return victim.relative_to(directory).as_posix()


@pytest.mark.parametrize('how', ['tampered', 'truncated', 'missing'])
def test_damage_is_an_error_and_an_older_checkpoint_is_taken_only_on_request(tmp_path: Path, how: str) -> None:
    target = {'x': jax.ShapeDtypeStruct((64,), np.float32)}
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save(step, {'x': np.full(64, step, np.float32)})
    name = damage(tmp_path / '2', how)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(DamagedCheckpoint, match=name):
            manager.restore(target)
        with pytest.raises(DamagedCheckpoint, match=name):
            manager.restore(target, step=2, fall_back=True)
        restored = manager.restore(target, fall_back=True)
        assert restored.step == 1
        assert np.all(restored.state['x'] == 1)
        assert (tmp_path / 'damaged-2').is_dir()
        manager.save(2, {'x': np.full(64, 5, np.float32)})
        manager.wait()
        assert np.all(manager.restore(target).state['x'] == 5)


def test_a_step_whose_description_was_edited_is_damaged(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {'x': np.ones(2, np.float32)})
    path = tmp_path / '1' / 'model' / 'model.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'leaves': {'x': ['float16', [2]]}}))
    with CheckpointManager(tmp_path) as manager, pytest.raises(DamagedCheckpoint, match=r'model/model\.json: '):
        manager.restore()
