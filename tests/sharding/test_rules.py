import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jpt.models.families import config_from_hf
from jpt.models.transformer import init
from jpt.quant.lora import add_lora
from jpt.sharding.layout import make_layout, to_device_layout
from jpt.sharding.rules import (
    LOGICAL_AXES,
    MESH_AXES,
    Rules,
    Units,
    keep_axes,
    leaf_spec,
    logical_axes,
    param_specs,
    state_specs,
    storage_specs,
    units_of,
    used_axes,
)

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
SIZES = {'pipe': 1, 'data': 2, 'fsdp': 2, 'expert': 1, 'context': 1, 'tensor': 2}
NAMES = [f'{kind}/{path.name}' for kind in ('models', 'encoders') for path in sorted(GOLDEN.glob(f'{kind}/*'))]
# Kernels that fsdp does not divide: the router's, which is small, and those that read a small latent.
NOT_OVER_FSDP = ('mlp/router/kernel', 'attn/q_up/kernel', 'attn/kv_up/kernel')


def config_of(name):
    return config_from_hf(json.loads((GOLDEN / name / 'config.json').read_text()))


@functools.cache
def canonical_shapes(cfg):
    return jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))


def shapes_of(cfg, **sizes):
    """A family's parameters as they lie in memory (vocabulary padded, layers staged), and whether they are staged."""
    shapes = canonical_shapes(cfg)
    layout = make_layout(shapes, SIZES | sizes)
    return jax.eval_shape(functools.partial(to_device_layout, layout), shapes), layout.staged


def rules_for(cfg, staged=False, **sizes):
    return Rules(SIZES | sizes, units_of(cfg), staged)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('pipe', [1, 2])
def test_every_leaf_of_every_family_has_a_place(name, pipe):
    cfg = config_of(name)
    even = cfg.num_heads % 2 == 0 and (cfg.experts is None or cfg.experts.width % 2 == 0)
    sizes = {'pipe': pipe, 'tensor': 2 if even else 1}
    placed, staged = shapes_of(cfg, **sizes)
    specs = param_specs(placed, rules_for(cfg, staged, **sizes))
    assert jax.tree.structure(specs, is_leaf=lambda leaf: isinstance(leaf, P)) == jax.tree.structure(placed)
    flat = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    for (path, spec), leaf in zip(flat, jax.tree.leaves(placed), strict=True):
        assert len(spec) == len(leaf.shape), path
        keys = '/'.join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        if keys.endswith(('kernel', 'embedding')):
            assert ('fsdp' in used_axes(spec)) == (not keys.endswith(NOT_OVER_FSDP)), path
        if keys.endswith('scale'):  # the channels of a Mamba layer are divided with its heads
            assert not used_axes(spec) - {'pipe', *(['tensor'] if keys.endswith('mamba/norm/scale') else [])}, path
        assert ('pipe' in used_axes(spec)) == (
            pipe > 1 and ('layers' in str(path[0]) or 'lm_head' in str(path[0]) or "'embed'" in str(path[0]))
        ), path


def test_the_table_of_one_model_written_out():
    cfg = config_of('models/qwen2')
    specs = param_specs(shapes_of(cfg)[0], rules_for(cfg))
    layer = specs['layers'][0][0]
    assert layer['attn']['q']['kernel'] == P(None, 'tensor', 'fsdp')
    assert layer['attn']['q']['bias'] == P(None, 'tensor')
    assert layer['attn']['out']['kernel'] == P(None, 'fsdp', 'tensor')
    assert layer['mlp']['gate']['kernel'] == P(None, 'tensor', 'fsdp')
    assert layer['mlp']['down']['kernel'] == P(None, 'fsdp', 'tensor')
    assert layer['attn_norm']['scale'] == P(None, None)
    assert specs['embed']['embedding'] == P('tensor', 'fsdp')
    assert specs['final_norm']['scale'] == P(None)


def test_vocabulary_lies_over_pipe_and_tensor_and_stages_over_pipe():
    rules = Rules(SIZES | {'pipe': 4}, Units(4, 4), staged=True)
    assert leaf_spec(('embed', 'embedding'), (64, 8), rules) == P(('pipe', 'tensor'), 'fsdp')
    keys = ('layers', '0', '0', 'mlp', 'up', 'kernel')
    assert leaf_spec(keys, (4, 1, 2, 12, 8), rules) == P('pipe', None, None, 'tensor', 'fsdp')


def test_a_projection_to_a_teacher_is_divided_over_fsdp_alone():
    """Whatever its pair is called; its rows are of the teacher's width, which fits no axis of the student."""
    keys = ('projections', 'mse-layers_1_output-layers_2_output', 'to_teacher', 'kernel')
    assert leaf_spec(keys, (7, 8), Rules(SIZES | {'pipe': 4}, Units(4, 4), staged=True)) == P(None, 'fsdp')


def test_kv_heads_that_do_not_divide_are_held_whole():
    """Three KV heads of size 4 have 12 rows, which tensor=2 would divide: but not at a head."""
    rules = Rules(SIZES, Units(heads=6, kv_heads=3))
    assert leaf_spec(('attn', 'k', 'kernel'), (12, 8), rules) == P(None, 'fsdp')
    assert leaf_spec(('attn', 'v', 'bias'), (12,), rules) == P(None)
    assert leaf_spec(('attn', 'q', 'kernel'), (24, 8), rules) == P('tensor', 'fsdp')


@pytest.mark.parametrize(
    ('keys', 'shape', 'units', 'words'),
    [
        ('attn/q/kernel', (12, 8), Units(3, 3), ['attn/q/kernel', 'heads', '3 pieces', 'tensor=2']),
        ('mlp/up/kernel', (9, 8), Units(4, 4), ['mlp/up/kernel', '(9, 8)', 'mlp', 'tensor=2']),
        ('mlp/up/kernel', (8, 9), Units(4, 4), ['dimension 1', 'embed', 'fsdp=2']),
        ('embed/embedding', (50257, 8), Units(4, 4), ['50257', 'vocab', 'tensor=2']),
        ('mlp/up/kernel', (8,), Units(4, 4), ['mlp/up/kernel', '(8,)', '2 dimensions']),
        ('mlp/side/kernel', (8, 8), Units(4, 4), ['no sharding rule', 'mlp/side/kernel', 'mlp/up/kernel']),
    ],
)
def test_what_does_not_divide_is_an_error_that_names_it(keys, shape, units, words):
    with pytest.raises(ValueError) as error:
        leaf_spec(tuple(keys.split('/')), shape, Rules(SIZES, units))
    for word in words:
        assert word in str(error.value)


def test_two_dimensions_on_one_mesh_axis_collide():
    rules = Rules(SIZES, Units(4, 4), mesh_axes=MESH_AXES | {'embed': ('tensor',)})
    with pytest.raises(ValueError, match=r"mlp/up/kernel .*'mlp', 'embed'.* puts? two dimensions on tensor"):
        leaf_spec(('mlp', 'up', 'kernel'), (8, 8), rules)


def test_axes_of_size_one_are_left_out():
    rules = Rules(dict.fromkeys(SIZES, 1), Units(3, 1))
    for path, axes in LOGICAL_AXES.items():
        assert used_axes(leaf_spec(tuple(path.split('/')), (7,) * len(axes), rules)) == frozenset()


def test_low_rank_factors_follow_their_kernel():
    cfg = config_of('models/llama_tied')
    adapted = jax.eval_shape(
        lambda key: add_lora(init(cfg, key), key, ('layers/**/attn/{q,out}',), rank=4, alpha=8.0, place='test'),
        jax.random.key(0),
    )
    specs = param_specs({'layers': adapted['layers']}, rules_for(cfg))
    attn = specs['layers'][0][0]['attn']
    assert attn['q']['kernel'].base == P(None, 'tensor', 'fsdp')
    assert attn['q']['kernel'].a == P(None, None, 'fsdp')
    assert attn['q']['kernel'].b == P(None, 'tensor', None)
    assert attn['out']['kernel'].a == P(None, None, 'tensor')
    assert attn['out']['kernel'].b == P(None, 'fsdp', None)
    assert logical_axes(('layers', '0', '0', 'mlp', 'down', 'kernel', 'codes')) == ('embed', 'mlp')


def test_optimizer_state_lies_as_its_parameters():
    params = {'embed': {'embedding': jnp.zeros((8, 4))}, 'final_norm': {'scale': jnp.zeros(4)}}
    specs = {'embed': {'embedding': P('tensor', 'fsdp')}, 'final_norm': {'scale': P(None)}}
    state = {
        'updates': jnp.zeros((), jnp.int32),
        'moments': [params, {'embed': {'embedding': {'codes': jnp.zeros((8, 4)), 'scale': jnp.zeros((8, 1))}}}],
        'statistics': {'embed': {'embedding': jnp.zeros(8)}},
    }
    got = state_specs(state, params, specs, SIZES)
    assert got['updates'] == P()
    assert got['moments'][0] == specs
    assert got['moments'][1]['embed']['embedding'] == {'codes': P('tensor', 'fsdp'), 'scale': P('tensor', None)}
    assert got['statistics']['embed']['embedding'] == P()


def test_what_is_saved_lies_on_all_devices_that_divide_it():
    sizes = SIZES | {'pipe': 4}
    mlp = {
        'up': {'kernel': P('pipe', None, None, 'tensor', 'fsdp')},
        'down': {'kernel': P('pipe', None, None, 'fsdp', 'tensor')},
    }
    specs = {
        'mu': {
            'embed': {'embedding': P(('pipe', 'tensor'), 'fsdp')},
            'lm_head': {'kernel': P(('pipe', 'tensor'), 'fsdp')},
            'layers': [[{'mlp': mlp, 'attn_norm': {'scale': P('pipe', None, None, None)}}]],
            'final_norm': {'scale': P(None)},
            'statistics': P(),
        },
        'updates': P(),
        'frozen': None,
    }
    stored = {
        'mu': {
            'embed': {'embedding': jnp.zeros((50257, 16))},
            'lm_head': {'kernel': jnp.zeros((50254, 6))},
            'layers': [
                [
                    {
                        'mlp': {'up': {'kernel': jnp.zeros((8, 12, 6))}, 'down': {'kernel': jnp.zeros((7, 8, 12))}},
                        'attn_norm': {'scale': jnp.zeros((7, 5))},
                    }
                ]
            ],
            'final_norm': {'scale': jnp.zeros(6)},
            'statistics': jnp.zeros((3, 4)),
        },
        'updates': jnp.zeros(()),
        'frozen': None,
    }
    got = storage_specs(specs, stored, sizes)
    assert got['mu']['embed']['embedding'] == P(None, ('fsdp', 'pipe', 'tensor'))
    assert got['mu']['lm_head']['kernel'] == P('tensor', 'fsdp')
    layer = got['mu']['layers'][0][0]
    assert layer['mlp']['up']['kernel'] == P('pipe', 'tensor', 'fsdp')
    assert layer['mlp']['down']['kernel'] == P(None, ('fsdp', 'pipe'), 'tensor')
    assert layer['attn_norm']['scale'] == P(None, None)
    assert got['mu']['final_norm']['scale'] == P(None)
    assert got['mu']['statistics'] == P(None, None)
    assert got['updates'] == P()
    assert got['frozen'] is None


def test_specs_are_cut_down_to_some_axes():
    spec = P(('pipe', 'tensor'), 'fsdp', None, 'tensor')
    assert keep_axes(spec, frozenset({'pipe', 'fsdp'})) == P('pipe', 'fsdp', None, None)
    assert keep_axes(spec, frozenset({'pipe', 'tensor'})) == P(('pipe', 'tensor'), None, None, 'tensor')
    assert used_axes(spec) == {'pipe', 'tensor', 'fsdp'}
