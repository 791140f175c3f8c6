"""A narrower model: its tensors are rows and columns of the whole one's, and nothing else is different."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from jpt.checkpoint.opening import open_model
from jpt.checkpoint.sliced import Kept, SlicedSource
from jpt.checkpoint.source import TreeSource, load_tree, whole
from jpt.models.config import LayerKind, ModelConfig, Rope, Segment
from jpt.models.names import leaves, to_hf
from jpt.models.transformer import forward, init, unembed

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
CFG = ModelConfig(
    family='olmo2',
    vocab_size=23,
    width=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    segments=(Segment((LayerKind(Rope(), mlp_width=6),), 2),),
    max_length=32,
    qkv_bias=True,
    attention_out_bias=True,
    qk_norm=True,
    qk_norm_over_heads=True,
    post_norms=True,
    pre_norms=False,
)
KEPT = Kept(width=(0, 2, 3, 7), mlp=((0, 5), (1, 2)), heads=((2,), (1,)), kv_heads=((1,), (0,)))


def filled(cfg: ModelConfig) -> dict:
    """Parameters of which no two entries are equal."""
    count = iter(range(10**6))
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    return jax.tree.map(lambda x: np.array([next(count) for _ in range(x.size)], np.float32).reshape(x.shape), shapes)


def test_tensors_are_rows_and_columns_of_the_whole_model():
    """By their names in the files; two layers that keep different heads and channels."""
    params = filled(CFG)
    source = SlicedSource(TreeSource(CFG, params), KEPT)
    small, big = to_hf(source.cfg, load_tree(source)), to_hf(CFG, params)
    width, layer = [0, 2, 3, 7], 'model.layers.{}.'
    wanted = {'model.embed_tokens.weight': big['model.embed_tokens.weight'][:, width]}
    wanted |= {name: big[name][..., width] for name in ('model.norm.weight', 'lm_head.weight')}
    for number, (channels, q, kv) in enumerate((([0, 5], [4, 5], [2, 3]), ([1, 2], [2, 3], [0, 1]))):
        at = layer.format(number)
        heads = {'q': q, 'k': kv, 'v': kv}
        for name, rows in heads.items():
            wanted[f'{at}self_attn.{name}_proj.weight'] = big[f'{at}self_attn.{name}_proj.weight'][rows][:, width]
            wanted[f'{at}self_attn.{name}_proj.bias'] = big[f'{at}self_attn.{name}_proj.bias'][rows]
        wanted |= {f'{at}self_attn.{n}_norm.weight': big[f'{at}self_attn.{n}_norm.weight'][heads[n]] for n in 'qk'}
        wanted[f'{at}self_attn.o_proj.weight'] = big[f'{at}self_attn.o_proj.weight'][width][:, q]
        wanted[f'{at}self_attn.o_proj.bias'] = big[f'{at}self_attn.o_proj.bias'][width]
        for name in ('gate', 'up'):
            wanted[f'{at}mlp.{name}_proj.weight'] = big[f'{at}mlp.{name}_proj.weight'][channels][:, width]
        wanted[f'{at}mlp.down_proj.weight'] = big[f'{at}mlp.down_proj.weight'][width][:, channels]
        for name in ('post_attention_layernorm', 'post_feedforward_layernorm'):
            wanted[f'{at}{name}.weight'] = big[f'{at}{name}.weight'][width]
    assert small.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(small[name], values, err_msg=name)


def test_parts_are_parts_of_the_whole():
    source = SlicedSource(TreeSource(CFG, filled(CFG)), KEPT)
    for leaf in leaves(source.cfg):
        values = source.read(leaf, whole(leaf))
        assert values.shape == leaf.shape
        index = tuple(slice(size // 2, size) for size in leaf.shape)
        np.testing.assert_array_equal(source.read(leaf, index), values[index])
        assert source.read(leaf, (slice(0, 0), *index[1:])).shape == values[(slice(0, 0), *index[1:])].shape


def test_nothing_left_out_is_the_whole_model():
    source = open_model(MODELS / 'gemma3_irregular').source
    same = SlicedSource(source, Kept())
    assert same.cfg == source.cfg
    for leaf in leaves(source.cfg):
        np.testing.assert_array_equal(same.read(leaf, whole(leaf)), source.read(leaf, whole(leaf)))


@pytest.mark.parametrize('name', ['llama_bias', 'qwen3', 'olmo2'])
def test_norms_are_over_the_dimensions_that_stay(name):
    """A norm over n of N dimensions is one over all, the others 0, times sqrt(n / N), with eps times n / N."""
    source = open_model(MODELS / name).source
    cfg, params = source.cfg, jax.tree.map(np.array, load_tree(source))
    width = tuple(range(0, cfg.width, 2))
    small = SlicedSource(TreeSource(cfg, params), Kept(width=width))
    share = len(width) / cfg.width
    gone = np.setdiff1d(np.arange(cfg.width), width)
    zeroed = {'embed': 1, 'out': -2, 'down': -2}  # what writes into the residual stream, and on which axis

    def silenced(path, leaf):
        keys = [getattr(key, 'key', '') for key in path]
        leaf = leaf.copy()
        if keys[-1] == 'scale' and keys[-2] not in ('q_norm', 'k_norm'):
            leaf *= np.sqrt(share)
        if keys[-2] in zeroed:
            np.moveaxis(leaf, -1 if keys[-1] == 'bias' else zeroed[keys[-2]], 0)[gone] = 0
        return leaf

    # eps of norms within attention would change too, so none of it matters here: it is far below every mean square.
    big = jax.tree_util.tree_map_with_path(silenced, params)
    tokens = np.arange(12).reshape(2, 6)
    tiny = dataclasses.replace(cfg, norm_eps=1e-12)
    wanted = unembed(tiny, big, forward(tiny, big, tokens).hidden_BTD)
    tiny, params = dataclasses.replace(small.cfg, norm_eps=1e-12), load_tree(small)
    found = unembed(tiny, params, forward(tiny, params, tokens).hidden_BTD)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ('kept', 'message'),
    [
        (Kept(width=(0, 8)), r'width=\(0, 8\): expected numbers from 0 to 7 that ascend'),
        (Kept(width=(1, 0)), r'width=\(1, 0\): expected'),
        (Kept(mlp=((0,),)), r'mlp: 1 lists: expected one for each of 2 layers'),
        (Kept(mlp=((0,), (0, 1))), r'mlp=\(0, 1\): expected .* equally many in every layer'),
        (Kept(heads=((0, 1), (0, 2))), r'heads=\(0, 1\), kv_heads=\(0, 1\): expected equally many query heads'),
        (Kept(kv_heads=((0,), (0,))), r'heads=\(0, 1, 2, 3\), kv_heads=\(0,\): expected equally many'),
    ],
)
def test_what_cannot_be_kept_is_named(kept, message):
    with pytest.raises(ValueError, match=message):
        SlicedSource(TreeSource(CFG, filled(CFG)), kept)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('qwen3_moe', 'qwen3_moe has experts: only whole layers'),
        ('deepseek_v3_plain', 'deepseek_v3 has experts'),
        ('mamba2', 'mamba2 has Mamba layers'),
        ('nemotron_h', 'nemotron_h has Mamba layers'),
        ('gpt_oss', 'gpt_oss has experts'),
    ],
)
def test_models_with_other_parts_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        SlicedSource(open_model(MODELS / name).source, Kept(width=(0,)))


def test_what_no_config_can_say_is_refused():
    """GPT-2's head dimension is its width over its heads."""
    source = open_model(MODELS / 'gpt2').source
    heads = (tuple(range(1, source.cfg.num_heads)),) * source.cfg.num_layers
    with pytest.raises(ValueError, match=r'num_attention_heads=.*make no model of gpt2'):
        SlicedSource(source, Kept(heads=heads, kv_heads=heads))
