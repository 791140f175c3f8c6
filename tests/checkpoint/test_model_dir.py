"""jpt checkpoints as models: saved whole or streamed, from a training step, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hf_tensors import LLAMA, llama_tensors

from jpt.checkpoint import array_store, source
from jpt.checkpoint.hf_import import HuggingFaceSource, load_hf
from jpt.checkpoint.manager import CheckpointManager
from jpt.checkpoint.manifest import DamagedCheckpoint
from jpt.checkpoint.model_dir import (
    StoredSource,
    find_checkpoint,
    is_jpt_directory,
    load_model,
    save_model,
    write_model,
)
from jpt.models.names import leaves
from jpt.quant.dot import dense
from jpt.quant.lora import FREEZE_ALL_BUT_LORA, add_lora
from jpt.training.freeze import partition

Write = Callable[..., Path]


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_saved_and_streamed_models_load_bit_for_bit(
    write_hf_dir: Write, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: type
) -> None:
    directory = write_hf_dir(LLAMA, llama_tensors(dtype))
    cfg, params = load_hf(directory)
    save_model(tmp_path / 'saved', cfg, params, tokenizer_dir)
    monkeypatch.setattr(source, 'BLOCK_BYTES', 60)  # a few rows, so that leaves are grown in many steps
    monkeypatch.setattr(array_store, 'BLOCK_BYTES', 200)
    write_model(HuggingFaceSource(directory), tmp_path / 'streamed', assets=tokenizer_dir)
    for name in ('saved', 'streamed'):
        again, loaded, tokenizer = load_model(tmp_path / name)
        assert again == cfg
        assert_same(loaded, params)
        assert tokenizer is not None
        assert (tokenizer / 'tokenizer.json').read_bytes() == (tokenizer_dir / 'tokenizer.json').read_bytes()
    about = [json.loads((tmp_path / name / 'model' / 'model.json').read_text()) for name in ('saved', 'streamed')]
    assert about[0] == about[1]
    assert about[0]['tokenizer']


def test_orbax_alone_restores_a_streamed_state(
    write_hf_dir: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = llama_tensors(ml_dtypes.bfloat16)
    tensors['model.layers.2.input_layernorm.weight'][:] = 0  # a block of zeros is data, not an absent chunk
    monkeypatch.setattr(source, 'BLOCK_BYTES', 60)
    write_model(HuggingFaceSource(write_hf_dir(LLAMA, tensors)), tmp_path / 'out')
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        tree = checkpointer.restore(tmp_path / 'out' / 'state', args=ocp.args.PyTreeRestore())
    layer = tree['params']['layers']['0']['0']
    for number in range(3):
        start = f'model.layers.{number}.'
        np.testing.assert_array_equal(layer['mlp']['down']['kernel'][number], tensors[start + 'mlp.down_proj.weight'])
        np.testing.assert_array_equal(layer['attn_norm']['scale'][number], tensors[start + 'input_layernorm.weight'])


def test_parts_and_casts(write_hf_dir: Write, tmp_path: Path) -> None:
    tensors = llama_tensors()
    cfg, params = load_hf(write_hf_dir(LLAMA, tensors))
    save_model(tmp_path / 'out', cfg, params)
    stored = StoredSource(tmp_path / 'out', dtype='bfloat16')
    kernel = next(leaf for leaf in leaves(cfg) if leaf.path[-2:] == ('down', 'kernel'))
    part = stored.read(kernel, (slice(1, 3), slice(2, 5), slice(0, 7)))
    expected = [tensors[f'model.layers.{number}.mlp.down_proj.weight'][2:5, :7] for number in (1, 2)]
    np.testing.assert_array_equal(part, np.stack(expected).astype(ml_dtypes.bfloat16))
    assert stored.assets is None
    assert load_model(tmp_path / 'out')[2] is None


def test_loading_onto_a_mesh(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    rows = jax.sharding.NamedSharding(mesh, spec(None, 'a', 'b'))
    everywhere = jax.sharding.NamedSharding(mesh, spec())
    shardings = jax.tree.map(lambda leaf: rows if leaf.ndim == 3 else everywhere, params)
    save_model(tmp_path / 'out', cfg, jax.device_put(params, shardings))
    other = jax.sharding.NamedSharding(mesh, spec(None, 'b', 'a'))
    wanted = jax.tree.map(lambda leaf: other if leaf.ndim == 3 else everywhere, params)
    _, loaded, _ = load_model(tmp_path / 'out', shardings=wanted)
    assert_same(loaded, params)
    assert loaded['layers'][0][0]['mlp']['up']['kernel'].sharding == other


def test_a_training_step_is_a_model_too(write_hf_dir: Write, tmp_path: Path, tokenizer_dir: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    trainable, frozen = partition(params, ['embed', 'layers/*/attn'])
    with CheckpointManager(tmp_path / 'run' / 'checkpoints', model=cfg, assets=tokenizer_dir) as manager:
        for step in (9, 10):
            manager.save(step, {'params': trainable, 'frozen': {'model': frozen}, 'step': step})
    for path in (tmp_path / 'run', tmp_path / 'run' / 'checkpoints', tmp_path / 'run' / 'checkpoints' / '10'):
        assert find_checkpoint(path).name == '10'
        assert is_jpt_directory(path)
    again, loaded, tokenizer = load_model(tmp_path / 'run')
    assert again == cfg
    assert_same(loaded, params)
    assert tokenizer is not None


def test_adapters_of_a_training_step_are_merged(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors(ml_dtypes.bfloat16)))
    adapted = add_lora(params, jax.random.key(0), ['layers/*/attn/q'], rank=2, alpha=3.0)
    kernel = adapted['layers'][0][0]['attn']['q']['kernel']
    factor = np.random.default_rng(0).standard_normal(kernel.b.shape).astype(np.float32)
    kernel = dataclasses.replace(kernel, b=jnp.asarray(factor))
    adapted['layers'][0][0]['attn']['q']['kernel'] = kernel
    trainable, frozen = partition(adapted, FREEZE_ALL_BUT_LORA)
    with CheckpointManager(tmp_path / 'run', model=cfg) as manager:
        manager.save(1, {'params': trainable, 'frozen': {'model': frozen}})
    _, loaded, _ = load_model(tmp_path / 'run')
    merged = loaded['layers'][0][0]['attn']['q']['kernel']
    assert merged.dtype == ml_dtypes.bfloat16
    base = np.asarray(kernel.base).astype(np.float64)
    expected = base + 1.5 * np.einsum('lor,lri->loi', factor.astype(np.float64), np.asarray(kernel.a, np.float64))
    np.testing.assert_allclose(np.asarray(merged).astype(np.float64), expected, rtol=2**-8)
    assert_same(loaded['layers'][0][0]['attn']['k'], params['layers'][0][0]['attn']['k'])
    assert np.any(np.asarray(merged) != np.asarray(kernel.base))
    np.testing.assert_allclose(
        np.asarray(dense(kernel)).astype(np.float32),
        np.asarray(merged).astype(np.float32),
        rtol=2**-8,
    )


def test_a_state_without_all_weights_is_refused_by_name(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    del params['final_norm']
    with CheckpointManager(tmp_path / 'run', model=cfg) as manager:
        manager.save(1, {'params': params})
    with pytest.raises(ValueError, match=r'(?s)not the weights of its llama model:.*final_norm/scale: not in the'):
        load_model(tmp_path / 'run')
    with CheckpointManager(tmp_path / 'other') as manager:
        manager.save(1, {'params': params})
    with pytest.raises(ValueError, match='names no model config'):
        load_model(tmp_path / 'other')


def test_damage_is_found_before_anything_is_read(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    save_model(tmp_path / 'out', cfg, params)
    victim = max((tmp_path / 'out' / 'state').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(bytes(raw))
    with pytest.raises(DamagedCheckpoint, match=f'state/.*{victim.name}: checksum'):
        load_model(tmp_path / 'out')


def test_nothing_is_overwritten_and_wrong_parameters_are_named(write_hf_dir: Write, tmp_path: Path) -> None:
    directory = write_hf_dir(LLAMA, llama_tensors())
    cfg, params = load_hf(directory)
    with pytest.raises(FileExistsError, match='exists already'):
        save_model(directory, cfg, params)
    with pytest.raises(FileExistsError, match='exists already'):
        write_model(HuggingFaceSource(directory), directory)
    del params['lm_head']
    with pytest.raises(ValueError, match='lm_head/kernel: not in the tree'):
        save_model(tmp_path / 'out', cfg, params)
    assert not (tmp_path / 'out').exists()


def test_what_is_no_checkpoint(tmp_path: Path, write_hf_dir: Write) -> None:
    assert not is_jpt_directory(tmp_path)
    assert not is_jpt_directory(write_hf_dir(LLAMA, llama_tensors()))
    with pytest.raises(FileNotFoundError, match=r'is not a jpt checkpoint: expected model/model\.json in it'):
        load_model(tmp_path / 'nothing')


def test_an_unfinished_step_is_not_taken(write_hf_dir: Write, tmp_path: Path) -> None:
    cfg, params = load_hf(write_hf_dir(LLAMA, llama_tensors()))
    save_model(tmp_path / 'run' / '3', cfg, params)
    shutil.copytree(tmp_path / 'run' / '3', tmp_path / 'run' / '4')
    shutil.rmtree(tmp_path / 'run' / '4' / 'manifest')
    shutil.copytree(tmp_path / 'run' / '3', tmp_path / 'run' / '5.orbax-checkpoint-tmp')
    assert find_checkpoint(tmp_path / 'run').name == '3'
