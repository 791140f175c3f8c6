"""Whole models with experts and states: what keeps its precision, what is refused, what an export reads."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpt
from jpt.checkpoint.hf_export import tensors_of, write_hf
from jpt.checkpoint.source import TreeSource
from jpt.models.config import Experts
from jpt.models.families import config_from_hf
from jpt.models.routing import choose, router_sums
from jpt.models.transformer import init
from jpt.quant.lora import add_lora
from jpt.sharding.mesh import MeshConfig, make_mesh
from jpt.sharding.plan import make_plan

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'


def read_config(name):
    return json.loads((MODELS / name / 'config.json').read_text())


def dtypes_by_name(params):
    """The dtypes of all leaves that end in the same name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.setdefault(path[-1].key, set()).add(str(leaf.dtype))
    return found


def test_corrections_stay_in_float32_and_the_model_computes_in_the_dtype_of_the_rest(tmp_path):
    """A step of 0.001 is lost beside 0.5 in bfloat16; transformers keeps this one in float32 too."""
    model = jpt.load(MODELS / 'deepseek_v3', dtype='bfloat16')
    wanted = {'correction': {'float32'}, 'kernel': {'bfloat16'}, 'scale': {'bfloat16'}, 'embedding': {'bfloat16'}}
    assert dtypes_by_name(model.params) == wanted
    assert dtypes_by_name(init(model.config, jax.random.key(0), 'bfloat16')) == wanted
    assert model.compute.dtype == jnp.bfloat16
    model.save(tmp_path / 'saved')
    assert dtypes_by_name(jpt.load(tmp_path / 'saved', dtype='bfloat16').params) == wanted
    model.export(tmp_path / 'out', dtype='bfloat16')
    again = jpt.load(tmp_path / 'out')
    assert dtypes_by_name(again.params) == wanted
    assert again.compute.dtype == jnp.bfloat16


def test_adapters_leave_experts_and_routers_alone():
    cfg = config_from_hf(read_config('deepseek_v3'))
    params = init(cfg, jax.random.key(0))
    adapted = add_lora(params, jax.random.key(1), ['layers/*/mlp'], rank=2, alpha=4.0)
    moe = adapted['layers'][1][0]['mlp']
    assert isinstance(moe['experts']['up']['kernel'], jax.Array)
    assert isinstance(moe['router']['kernel'], jax.Array)
    assert not isinstance(moe['shared']['up']['kernel'], jax.Array)
    with pytest.raises(ValueError, match='experts'):
        add_lora(params, jax.random.key(1), ['layers/*/mlp/experts'], rank=2, alpha=4.0)


@pytest.mark.parametrize('name', ['gpt_oss', 'llama4_text', 'mixtral'])
def test_an_export_reads_every_part_once_in_the_order_of_the_tensors(name, tmp_path, monkeypatch):
    """With several processes the others gather each array as often, in this order."""
    model = jpt.load(MODELS / name)
    source = TreeSource(model.config, model.params)
    read = source.read
    seen = []

    def counted(leaf, index):
        if not seen or seen[-1] != leaf.path:
            seen.append(leaf.path)
        return read(leaf, index)

    monkeypatch.setattr(source, 'read', counted)
    write_hf(source, tmp_path / 'out')
    paths = [part.leaf.path for parts in tensors_of(model.config).values() for part in parts]
    assert seen == [path for path, _ in itertools.groupby(paths)]


def test_a_sequence_over_devices_is_refused_for_layers_with_a_state():
    cfg = config_from_hf(read_config('nemotron_h'))
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    empty = jax.tree.map(lambda leaf: None, shapes)
    with pytest.raises(ValueError, match=r'mesh.context=2: model \(nemotron_h\) has layers that carry a state'):
        make_plan(make_mesh(MeshConfig(data=4, context=2)), {'model': cfg}, shapes, {'model': empty})


@pytest.mark.parametrize(
    ('name', 'change', 'message'),
    [
        ('qwen3_moe', {'decoder_sparse_step': 0}, 'decoder_sparse_step=0: expected a positive'),
        ('qwen3_moe', {'mlp_only_layers': [0, 1, 2, 3, 4, 5, 6, 7]}, 'mlp_only_layers names every layer'),
        ('llama4_text', {'no_rope_layer_interval': 0}, 'no_rope_layer_interval=0: expected a positive'),
        ('deepseek_v3', {'num_nextn_predict_layers': 1, 'first_k_dense_replace': 9}, 'num_nextn_predict_layers=1'),
        ('deepseek_v3', {'num_nextn_predict_layers': -1}, 'num_nextn_predict_layers=-1: expected 0 or more'),
        ('deepseek_v3', {'first_k_dense_replace': -2}, 'first_k_dense_replace=-2: expected 0 or more'),
        ('deepseek_v3', {'topk_group': 9}, 'top_groups=9'),
        ('mixtral', {'num_experts_per_tok': 99}, 'per_token=99'),
        ('nemotron_h', {'layers_block_type': ['mlp', 'rnn']}, r"layers_block_type\[1\]='rnn'"),
    ],
)
def test_configs_that_cannot_be_are_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(read_config(name) | change)


def test_text_that_no_expert_wants_gives_a_finite_balance():
    """Sigmoid scores may all be 0 in float32; a segment's number may be larger than the row is long."""
    choice = choose(Experts(4, 2, 8, 'sigmoid'), jnp.full((4, 4), -200.0))
    sums = router_sums(jnp.full((4, 4), -200.0), choice, jnp.full((1, 4), 9, jnp.int32))
    assert np.isfinite(sums.balance)
