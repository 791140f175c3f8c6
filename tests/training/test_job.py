"""The state on its way to a checkpoint and back: divided over the devices, and the same on every mesh."""

import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import ARCHITECTURE, settings

from jpt.checkpoint.manager import CheckpointMismatch
from jpt.model import load
from jpt.quant.dot import LoraKernel
from jpt.training import job as jobs
from jpt.training import loop
from jpt.training.run import train_model

MODELS = pathlib.Path(__file__).resolve().parents[1] / 'golden' / 'models'
# No mesh divides this vocabulary, and stages of three layers are not equally long.
ODD = {'architecture': ARCHITECTURE | {'vocab_size': 4099, 'num_hidden_layers': 3}}
PIPE = {'mesh': {'pipe': 2, 'data': 1, 'fsdp': 2, 'tensor': 2}, 'batch': {'size': 8, 'length': 32, 'microbatches': 2}}
TENSOR = {'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}}


def odd_settings(folder, **changes):
    return settings(folder, model=ODD, eval={}, **changes)


def leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def assert_divided(tree):
    """No device holds more than a quarter of any leaf but small ones; the largest are in as many parts as devices."""
    for name, leaf in leaves(tree):
        held = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert held <= max(leaf.size // 4, 64), name
        if "'embedding'" in name or "['mlp']" in name:
            assert held == leaf.size // 8, name


def as_bytes(leaf):
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def assert_same(one, other):
    for (name, left), (other_name, right) in zip(leaves(one), leaves(other), strict=True):
        assert name == other_name
        np.testing.assert_array_equal(as_bytes(left), as_bytes(right), err_msg=name)


def test_a_state_is_stored_divided_and_comes_back_bit_for_bit(tmp_path):
    piped = jobs.make_job(odd_settings(tmp_path, **PIPE))
    shapes = jobs.canonical_shapes(piped)
    assert shapes.params['embed']['embedding'].shape == (4099, 16)
    assert shapes.opt_state.mu['layers'][0][0]['mlp']['up']['kernel'].shape == (3, 24, 16)
    assert_divided(shapes)
    state = jobs.first_state(piped)
    stored = jobs.canonical(piped, state)
    assert_divided(stored)
    assert jobs.places_of(stored) == jobs.places_of(shapes)
    plain = jobs.make_job(odd_settings(tmp_path))
    assert_same(stored, jobs.canonical(plain, jobs.first_state(plain)))
    back = jobs.from_canonical(piped, stored)
    assert_same(back, state)
    assert [leaf.sharding for _, leaf in leaves(back)] == [leaf.sharding for _, leaf in leaves(state)]


def test_where_the_layout_is_the_same_nothing_is_copied(tmp_path):
    job = jobs.make_job(settings(tmp_path, eval={}, **TENSOR))
    state = jobs.first_state(job)
    stored = jobs.canonical(job, state)
    assert all(one is other for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(state), strict=True))
    assert jobs.places_of(jobs.canonical_shapes(job)) == jobs.places_of(stored)


def test_weights_are_read_in_parts_with_adapters_and_a_teacher(tmp_path):
    path = str(MODELS / 'llama_tied')
    lora = {'rank': 4, 'alpha': 6.0, 'rank_stabilized': True}
    given = {'model': {'path': path}, 'task': 'distill', 'teacher': {'path': path}, 'lora': lora}
    job = jobs.make_job(settings(tmp_path, **given, **PIPE))
    for name in ('model', 'teacher'):
        for leaf_name, leaf in leaves(jobs._load(job, name)):
            assert not leaf.sharding.is_fully_replicated or leaf.size < 1000, leaf_name
    state = jobs.first_state(job)
    kernels = jax.tree.leaves(state.params, is_leaf=lambda node: isinstance(node, LoraKernel))
    assert {kernel.scale for kernel in kernels} == {3.0}  # alpha / sqrt(rank)
    expected = load(path).params
    assert_same(jobs.whole_model(job, state), expected)
    back = jobs.from_canonical(job, jobs.canonical(job, state))
    assert_same(back, state)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return {row['step']: row['loss'] for row in rows}


def test_a_run_goes_on_on_other_meshes_with_the_same_losses(tmp_path, monkeypatch):
    """Two steps on a pipeline, two on tensor shards, two on the pipeline again, against six on data shards."""
    train_model(odd_settings(tmp_path, steps=6), tmp_path / 'whole')
    for mesh, stop in ((PIPE, 2), (TENSOR, 4), (PIPE, 6)):
        monkeypatch.setattr(loop, '_asked_to_stop', lambda asked, step, stop=stop: 'test' if step == stop else None)
        if stop < 6:
            with pytest.raises(loop.StoppedError):
                train_model(odd_settings(tmp_path, steps=6, **mesh), tmp_path / 'moved')
        else:
            train_model(odd_settings(tmp_path, steps=6, **mesh), tmp_path / 'moved')
    whole, moved = losses(tmp_path / 'whole'), losses(tmp_path / 'moved')
    assert list(moved) == list(whole) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(moved.values()), list(whole.values()), rtol=1e-5)
    for changes, line in (
        ({'optimizer': {'name': 'muon'}}, r'opt_state/nu/layers/0\.0/attn/q/kernel: float32\[3, 16, 16\] in the ch'),
        ({'compute': {'param_dtype': 'bfloat16'}}, r'params/embed/embedding: float32\[4099, 16\].*expected bfloat16'),
        ({'ema': 0.9}, r'ema/embed/embedding: not in the checkpoint, expected float32\[4099, 16\]'),
        ({'model': {'architecture': ODD['architecture'] | {'intermediate_size': 32}}}, r'model\.segments: '),
    ):
        config = settings(tmp_path, **({'model': ODD, 'eval': {}, 'steps': 7} | changes))
        with pytest.raises(CheckpointMismatch, match=line):
            train_model(config, tmp_path / 'moved')


def test_an_average_is_exported_in_the_dtypes_of_the_parameters(tmp_path):
    """It is kept in float32, and scored in bfloat16: 1 + 1 / 512 is not a bfloat16 number, 1 is the nearest."""
    config = odd_settings(tmp_path, ema=0.9, compute={'param_dtype': 'bfloat16'})
    job = jobs.make_job(config)
    state = jobs.first_state(job)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.ema)} == {'float32'}
    state = state._replace(ema=jax.tree.map(lambda leaf: np.full_like(leaf, 1 + 1 / 512), state.ema))
    exported = jobs.whole_model(job, state, averaged=True)
    for name, leaf in leaves(exported):
        assert leaf.dtype == 'bfloat16', name
        assert np.all(np.asarray(leaf, np.float32) == 1), name


def test_a_student_begins_with_layers_of_its_teacher(tmp_path):
    """The first and the last one; everything around them is the teacher's too."""
    path = str(MODELS / 'llama')
    teacher = load(path)
    last = teacher.config.num_layers - 1
    given = {'task': 'distill', 'model': {'path': path, 'layers': (0, last)}, 'teacher': {'path': path}}
    job = jobs.make_job(settings(tmp_path, eval={}, **given), jax.devices()[:1])
    student = jax.device_get(jobs.first_state(job).params)
    assert job.models['model'].cfg.num_layers == 2
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf)[[0, last]], teacher.params['layers'])
    jax.tree.map(np.testing.assert_array_equal, student['layers'], wanted)
    np.testing.assert_array_equal(student['embed']['embedding'], teacher.params['embed']['embedding'])
