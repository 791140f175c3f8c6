"""Sensitivities beside float64 divergences of models with one weight changed; recipes by layer; what is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import CFG, small_model, texts

from jpt.config import ConfigError
from jpt.model import Model
from jpt.models.config import Experts, LayerKind, ModelConfig, Segment
from jpt.models.splitting import places
from jpt.models.transformer import init
from jpt.quant.formats import FORMATS, Format
from jpt.quant.recipes import chosen, recipe_of
from jpt.quant.tensors import QTensor, dequantize
from jpt.quantization.auto import automatic, fitting
from jpt.quantization.by_layer import by_layer
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.checks import check_measurable, check_shards
from jpt.quantization.inputs import weights_of
from jpt.quantization.sensitivity import by_gradient, by_kl, groups_by_layer
from jpt.quantization.settings import AutoConfig, CalibrationConfig, QuantizeConfig
from jpt.sharding.mesh import MeshConfig, batch_shardings, make_mesh
from jpt.sharding.rules import Rules, param_specs, shardings, units_of

ALL = (('layers/**', 'int8'),)


def calm_model() -> Model:
    """The small model without its loud channels, and with layers that matter more and less."""
    params = jax.tree.map(lambda leaf: leaf, small_model().params)
    layer = params['layers'][0][0]
    for name in ('attn_norm', 'mlp_norm'):
        layer[name]['scale'] = jnp.ones_like(layer[name]['scale'])
    layer['mlp']['down']['kernel'] = layer['mlp']['down']['kernel'] * jnp.array([0.02, 1.0, 0.2])[:, None, None]
    return Model(CFG, params)


def tensors_of(model: Model, name: str) -> dict[str, QTensor]:
    formats = chosen(model.params, recipe_of(name))
    return weights_of(calibrated_params(model, formats, [texts(6)], CalibrationConfig()), formats)


def divergence(model: Model, params, batch) -> float:
    """KL(model || model with these parameters) per predicted token, float64 over the logits."""
    logits = [np.asarray(one.logits(batch.tokens, batch.positions, batch.segment_ids), np.float64)
              for one in (model, dataclasses.replace(model, params=params))]  # fmt: skip
    log_p, log_q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
                    for x in logits)  # fmt: skip
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return float((kl * batch.loss_mask).sum() / batch.loss_mask.sum())


def test_sensitivities_are_divergences():
    model, batch = calm_model(), texts(6)
    tensors = tensors_of(model, 'int4_weights')
    groups = groups_by_layer(CFG, tensors)
    assert [(g.layer, g.name) for g in groups[:4]] == [
        (0, 'attn/{k,q,v}'), (0, 'attn/out'), (0, 'mlp/down'), (0, 'mlp/{gate,up}'),
    ]  # fmt: skip
    lines = []
    tried = by_kl(model, tensors, groups, [batch], lines.append)
    assert lines[-1] == '12 of 12 groups tried'
    scores = by_gradient(model, tensors, [batch] * 24)  # words are drawn anew for each
    wanted = []
    for group in groups:
        params = jax.tree.map(lambda leaf: leaf, model.params)
        for path in group.paths:
            *_, part, name, _ = path.split('/')
            node = params['layers'][0][0][part][name]
            node['kernel'] = node['kernel'].at[group.repeat].set(dequantize(tensors[path])[group.repeat])
        wanted.append(divergence(model, params, batch))
    np.testing.assert_allclose(tried, wanted, rtol=2e-3, atol=1e-8)
    guessed = [sum(scores[path][group.repeat] for path in group.paths) for group in groups]
    ratio = np.array(guessed) / wanted
    assert np.abs(np.log(ratio)).max() < np.log(3), ratio
    assert np.corrcoef(np.log(guessed), np.log(wanted))[0, 1] > 0.9


def test_experts_of_a_layer_are_one_group():
    kinds, experts = (LayerKind(experts=True),), Experts(4, 2, 16)
    cfg = ModelConfig('qwen3_moe', 32, 16, 4, 2, 4, (Segment(kinds, 2),), 32, experts=experts)
    model = Model(cfg, jax.jit(init, static_argnums=0)(cfg, jax.random.key(0)))
    batches = [texts(6)]
    recipe = (('layers/*/mlp/experts/**', 'nvfp4'),)
    tried = automatic(model, recipe, batches, AutoConfig(('nvfp4', 'none'), 10, 'kl')).groups
    guessed = automatic(model, recipe, batches * 8, AutoConfig(('nvfp4', 'none'), 10)).groups
    assert [each.name for each in tried] == ['mlp/experts/down', 'mlp/experts/{gate,up}'] * 2
    for one, other in zip(tried, guessed, strict=True):
        assert one.weights == 4 * 16 * 16 * (2 if 'gate' in one.name else 1)
        assert one.bits['nvfp4'] == 4 + 8 / 16 + 32 / 256  # a second scale for each expert
        assert 1 / 3 < other.sensitivity['nvfp4'] / one.sensitivity['nvfp4'] < 3


DENSE = dataclasses.replace(CFG, vocab_size=32, segments=(Segment((LayerKind(mlp_width=32),), 4),))
MIXED = ModelConfig(
    'qwen3_moe', 32, 16, 4, 2, 4, (Segment((LayerKind(experts=True),), 2),), 32, experts=Experts(4, 2, 32)
)


@pytest.mark.parametrize(
    ('cfg', 'sizes', 'score'),
    [
        (DENSE, {'pipe': 2, 'data': 2, 'tensor': 2}, 'gradient'),
        (MIXED, {'expert': 2, 'tensor': 2, 'fsdp': 2}, 'gradient'),
        (MIXED, {'pipe': 2, 'tensor': 2, 'expert': 2}, 'kl'),
    ],
    ids=('stages', 'experts', 'experts tried'),
)
def test_sensitivities_do_not_depend_on_the_mesh(cfg, sizes, score):
    """Shards of `tensor` have parts of what experts' down reads: the change that is squared is their sum."""
    params, batch = jax.jit(init, static_argnums=0)(cfg, jax.random.key(0)), texts(8)
    recipe, auto = (('layers/**', 'nvfp4'),), AutoConfig(('nvfp4', 'none'), 9, score)
    wanted = automatic(Model(cfg, params), recipe, [batch], auto)
    devices = make_mesh(MeshConfig(**sizes))
    placed = jax.device_put(params, shardings(devices, param_specs(params, Rules(devices.shape, units_of(cfg)))))
    batch = jax.device_put(batch, batch_shardings(devices, batch))
    with jax.set_mesh(devices):
        found = automatic(Model(cfg, placed, mesh=devices), recipe, [batch], auto)
    for one, other in zip(wanted.groups, found.groups, strict=True):
        assert (other.name, other.chosen) == (one.name, one.chosen)
        assert other.sensitivity['nvfp4'] == pytest.approx(one.sensitivity['nvfp4'], rel=1e-2)


def test_what_shards_of_experts_cannot_multiply_is_left_out():
    """A token's inputs lie on two shards of `tensor`, and half of 32 is no block of 32."""
    model = Model(MIXED, jax.jit(init, static_argnums=0)(MIXED, jax.random.key(0)))
    weights = weights_of(model.params, chosen(model.params, recipe_of([('layers/*/mlp/experts/**', 'int8')])))
    gate, up, down = (f'layers/0.0/mlp/experts/{name}/kernel' for name in ('gate', 'up', 'down'))
    assert set(fitting(weights, 'int8')) == set(fitting(weights, 'nvfp4')) == {gate, up, down}
    blocks = Format('int8', 1, inputs='block', input_columns=32)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2, expert=4))):
        assert set(fitting(weights, 'int8')) == {gate, up}
        assert set(fitting(weights, 'nvfp4')) == {gate, up, down}
        with pytest.raises(ValueError, match=rf'{down}: .* lie on 2 shards .* tensor=1'):
            check_measurable(model, {up: FORMATS['int8'], down: FORMATS['int8']}, CalibrationConfig())
        with pytest.raises(ValueError, match=r'blocks of 32 inputs .* expected 32 to be a multiple of 64'):
            check_shards(down, weights[down], blocks)


def test_a_recipe_names_layers_by_their_numbers():
    model = small_model()
    given = recipe_of([('layers/**', 'int8'), ('layers.{0,2}/mlp/down', 'nvfp4'), ('layers.1/attn/{q,k,v}', None)])
    made, recipe = by_layer(model, given)
    formats = chosen(made.params, recipe)
    found = {}
    for number, ((segment, kind), _) in enumerate(places(made.config)):
        for name in ('attn/q', 'attn/k', 'attn/v', 'attn/out', 'mlp/up', 'mlp/gate', 'mlp/down'):
            found[number, name] = formats.get(f'layers/{segment}.{kind}/{name}/kernel')
    changed = {(0, 'mlp/down'): 'nvfp4', (2, 'mlp/down'): 'nvfp4'} | {(1, f'attn/{n}'): None for n in 'qkv'}
    assert found == {key: FORMATS.get(changed.get(key, 'int8')) for key in found}
    assert by_layer(model, recipe_of('int8')) == (model, recipe_of('int8'))
    with pytest.raises(ValueError, match=r'recipe.1: .* there is no layer 3: expected numbers from 0 to 2'):
        by_layer(model, recipe_of([('layers/**', 'int8'), ('layers.3/**', 'nvfp4')]))


@pytest.mark.parametrize('score', ['gradient', 'kl'])
def test_what_is_chosen_loses_the_least_within_the_budget(score):
    model, auto = calm_model(), AutoConfig(('nvfp4', 'int8', 'none'), 7.0, score)
    found = automatic(model, (*ALL, ('layers/**/out', 'none')), [texts(6)], auto)
    assert {each.name for each in found.groups} == {'attn/{k,q,v}', 'mlp/down', 'mlp/{gate,up}'}
    assert found.bits <= 7
    # int8 has a scale of 32 bits per row; weights as they are have float32's bits.
    down = next(each for each in found.groups if each.name == 'mlp/down')
    nvfp4 = 4 + (8 * 16 * 2 + 32) / (16 * 24)  # two blocks in a row of 24, and the second scale
    assert down.bits == pytest.approx({'nvfp4': nvfp4, 'int8': 8 + 32 / 24, 'none': 32})
    for each in found.groups:
        assert each.sensitivity['none'] == 0 < each.sensitivity['int8'] < each.sensitivity['nvfp4']
    # No exchange of a group's format for another, or of two groups', is within the budget and loses less.
    total = sum(each.weights for each in found.groups)
    for one in found.groups:
        for other in found.groups:
            for a in one.bits:
                for b in other.bits if other is not one else [a]:
                    moves = {id(one): (one, a), id(other): (other, b)}.values()
                    cost = sum((e.bits[to] - e.bits[e.chosen]) * e.weights for e, to in moves) / total
                    gain = sum(e.sensitivity[e.chosen] - e.sensitivity[to] for e, to in moves)
                    assert found.bits + cost > 7 + 1e-9 or gain <= 1e-12
    assert len({each.chosen for each in found.groups}) > 1
    # The recipe says the same, layer by layer.
    made, recipe = by_layer(model, found.choices())
    formats = chosen(made.params, recipe)
    for each in found.groups:
        (segment, kind), _ = places(made.config)[each.layer]
        module, names = each.name.split('/')
        for name in names.strip('{}').split(','):
            form = formats.get(f'layers/{segment}.{kind}/{module}/{name}/kernel')
            assert form == FORMATS.get(each.chosen)
    assert not any(path.endswith('out/kernel') for path in formats)


def test_what_cannot_be_is_an_error():
    model, batches = calm_model(), [texts(6)]
    with pytest.raises(ValueError, match=r'auto.bits=4: expected 4\.\d+ at least'):
        automatic(model, ALL, batches, AutoConfig(('nvfp4', 'int8'), 4))
    with pytest.raises(ValueError, match='without numbers'):
        automatic(model, (*ALL, ('layers.1/**', 'none')), batches, AutoConfig(('nvfp4',)))
    bad = jax.tree.map(lambda leaf: leaf, model.params)
    bad['embed']['embedding'] = bad['embed']['embedding'].at[texts(6).tokens[0, 0]].set(jnp.nan)
    auto, how = AutoConfig(('int4_weights', 'int8')), CalibrationConfig(weights='weighted_mse')
    with pytest.raises(ValueError, match='not finite'):
        automatic(dataclasses.replace(model, params=bad), ALL, batches, auto, how)
    with pytest.raises(ValueError, match=r'auto.bits=40: expected less than the 32 bits that weights have as they are'):
        automatic(model, ALL, batches, AutoConfig(('nvfp4', 'none'), 40))
    bad = jax.tree.map(lambda leaf: leaf, model.params)
    up = bad['layers'][0][0]['mlp']['up']
    up['kernel'] = up['kernel'].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match='mlp/up/kernel: holds NaN'):
        automatic(dataclasses.replace(model, params=bad), ALL, batches, AutoConfig(('nvfp4',)))
    with pytest.raises(ValueError, match='there is no layer 31: expected numbers from 0 to'):
        by_layer(model, recipe_of([('layers.{0,31}/mlp/down', 'int8')]))
    for settings in ({'auto': AutoConfig(bits=5.0)}, {'max_shard_size': '1MB'}):
        with pytest.raises(ConfigError, match='default'):
            QuantizeConfig(**settings)
    for wrong in ({'formats': ('fp7',)}, {'formats': ('none',)}, {'formats': ('int8', 'int8')}, {'bits': 0.0}):
        with pytest.raises(ConfigError):
            AutoConfig(**wrong)
