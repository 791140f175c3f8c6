"""Experts: what each reads and how far each is off, beside a loop over tokens; those that no token went to; a mesh."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import rounded, texts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import jpt
from jpt.model import Model
from jpt.models.calibration import calibrate
from jpt.models.config import Experts, LayerKind, ModelConfig, Segment
from jpt.models.transformer import forward, init
from jpt.quant.formats import Format
from jpt.quant.input_factors import smoothquant_factor
from jpt.quant.recipes import chosen, recipe_of
from jpt.quant.tensors import quantize
from jpt.quantization import report
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.inputs import node_of, tree_of, weights_of
from jpt.quantization.run import quantize_model
from jpt.quantization.settings import CalibrationConfig
from jpt.sharding.mesh import MeshConfig, make_mesh

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
E, F = 8, 16
CFG = ModelConfig('qwen3_moe', 32, 16, 4, 2, 4, (Segment((LayerKind(experts=True),), 2),), 32, experts=Experts(E, 2, F))
NAMES = ('gate', 'up', 'down')
LOUD, UNSEEN = 3, 5


@functools.cache
def mixture_model() -> Model:
    """Random weights, a loud channel before the experts, and a router that never chooses one expert."""
    keys = iter(jax.random.split(jax.random.key(4), 64))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), init(CFG, jax.random.key(0)))
    layer = params['layers'][0][0]
    layer['mlp_norm']['scale'] = jnp.abs(layer['mlp_norm']['scale']).at[:, LOUD].multiply(30)
    kernel = layer['mlp']['router']['kernel']
    # Of two pairs of opposite logits two are positive, so an expert whose logit is 0 is never among the two largest.
    kernel = 0.01 * kernel.at[:, 1].set(-kernel[:, 0]).at[:, 3].set(-kernel[:, 2]).at[:, UNSEEN].set(0)
    layer['mlp']['router']['kernel'] = kernel
    return Model(CFG, params)


def path_of(name: str) -> str:
    return f'layers/0.0/mlp/experts/{name}/kernel'


@functools.cache
def by_hand(rows: int) -> list[list[dict[str, np.ndarray]]]:
    """[layer][expert]: what its maps read, [tokens, in] float64."""
    batch, model = texts(rows), mixture_model()
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    found = [[{name: [] for name in NAMES} for _ in range(E)] for _ in range(2)]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.norm_eps) * scale

    for row in range(rows):
        h = p['embed']['embedding'][batch.tokens[row][batch.segment_ids[row] == 1]]
        for i in range(2):
            w = jax.tree.map(lambda x, i=i: x[i], p['layers'][0][0])
            a, t = w['attn'], len(h)
            x = norm(h, w['attn_norm']['scale'])
            q, k, v = ((x @ a[n]['kernel'].T).reshape(t, heads, 4) for n, heads in (('q', 4), ('k', 2), ('v', 2)))
            out = []
            for head in range(4):
                scores = q[:, head] @ k[:, head // 2].T / 2 + np.triu(np.full((t, t), -np.inf), 1)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // 2])
            h = h + np.concatenate(out, -1) @ a['out']['kernel'].T
            x = norm(h, w['mlp_norm']['scale'])
            logits = x @ w['mlp']['router']['kernel'].T
            share = np.exp(logits - logits.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            k = w['mlp']['experts']
            for token in range(t):
                best = np.argsort(-share[token])[:2]
                for e in best:
                    gate, up = (k[name]['kernel'][e] @ x[token] for name in ('gate', 'up'))
                    inner = gate / (1 + np.exp(-gate)) * up
                    for name, read in (('gate', x[token]), ('up', x[token]), ('down', inner)):
                        found[i][e][name].append(read)
                    h[token] += k['down']['kernel'][e] @ inner * share[token, e] / share[token, best].sum()
    return [[{name: np.array(reads) for name, reads in one.items()} for one in layer] for layer in found]


def measured(batches, compared=None, params=None):
    statistics = ('largest', 'absolute', 'square')
    return calibrate(CFG, mixture_model().params if params is None else params, batches, statistics, compared=compared)


INT4 = Format('int4', 1, 4)


def other_weights(form: Format):
    """The experts quantized, as a tree."""
    model = mixture_model()
    formats = chosen(model.params, recipe_of([('layers/**/experts', form)]))
    return tree_of(
        CFG,
        jax.jit(lambda all: {path: quantize(leaf, form) for path, leaf in all.items()})(
            weights_of(model.params, formats)
        ),
    )


def test_what_experts_read_and_how_far_they_are_off():
    batch = texts(6)
    found, wanted = measured([batch], other_weights(INT4)), by_hand(6)
    for name in NAMES:
        node = node_of(path_of(name), found)
        for layer, expert in np.ndindex(2, E):
            x = wanted[layer][expert][name]
            assert node['tokens'][layer, expert] == len(x)
            own = np.asarray(mixture_model().params['layers'][0][0]['mlp']['experts'][name]['kernel'][layer, expert])
            if not len(x):
                assert all(not values[layer, expert].any() for values in node['input'].values())
                continue
            read = {one: values[layer, expert] for one, values in node['input'].items()}
            np.testing.assert_allclose(read['largest'], np.abs(x).max(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(read['absolute'], np.abs(x).sum(0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(read['square'], np.square(x).sum(0), rtol=1e-4, atol=1e-6)
            y, off = x @ own.T.astype(np.float64), x @ (rounded(own, 7, 4) - own.astype(np.float64)).T
            output = {one: values[layer, expert] for one, values in node['output'].items()}
            np.testing.assert_allclose(output['signal'], np.square(y).sum(), rtol=1e-3)
            np.testing.assert_allclose(output['noise'], np.square(off).sum(), rtol=1e-3)


@pytest.mark.parametrize('sizes', [{'data': 4, 'expert': 2}, {'data': 2, 'expert': 2, 'tensor': 2}], ids=str)
def test_statistics_of_experts_are_the_same_on_a_mesh(sizes):
    """Rows divided over data and expert, experts over expert, their widths over tensor."""
    batch, others = texts(8), other_weights(INT4)
    whole = measured([batch], others)
    mesh = make_mesh(MeshConfig(**sizes))
    rows = NamedSharding(mesh, P(('data', 'fsdp', 'expert')))
    with jax.set_mesh(mesh):
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
        params, others = (jax.tree.map(place, tree) for tree in (mixture_model().params, others))
        found = measured([jax.device_put(batch, rows)], others, params)
    for name in NAMES:
        one, two = (node_of(path_of(name), each) for each in (whole, found))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5), one, two)


def test_experts_are_calibrated_one_by_one_and_the_unseen_one_is_listed(tmp_path):
    model, batches = mixture_model(), [texts(6)]
    how = CalibrationConfig(factors='smoothquant')
    made = quantize_model(model, recipe_of([('layers/**/experts', 'int8_tensor')]), batches, batches, how)
    found = weights_of(made.model.params, {path_of(name): None for name in NAMES})
    wanted = by_hand(6)
    for layer, expert in np.ndindex(2, E):
        own = {name: np.asarray(weights_of(model.params, found)[path_of(name)][layer, expert]) for name in NAMES}
        for name, members in (('up', ('gate', 'up')), ('gate', ('gate', 'up')), ('down', ('down',))):
            x, tensor = wanted[layer][expert][name], found[path_of(name)]
            if len(x):
                w = np.max([np.abs(own[member]).max(0) for member in members], axis=0)
                factor = smoothquant_factor(np.abs(x).max(0), w, 0.5)
                limit = np.abs(x * factor).max()
            else:
                factor = np.ones(own[name].shape[1])
                limit = 127 * np.max(tensor.input_scale[layer])  # the largest of all
            np.testing.assert_allclose(tensor.input_factor[layer, expert], factor, rtol=1e-4)
            np.testing.assert_allclose(tensor.input_scale[layer, expert], limit / 127, rtol=1e-4)
    assert made.unseen.keys() == {0, 1}
    assert all(UNSEEN in experts for experts in made.unseen.values())
    for layer, experts in made.unseen.items():
        assert experts == [e for e in range(E) if not len(wanted[layer][e]['up'])]
    assert report.to_json(made)['experts_without_tokens']['0'] == made.unseen[0]
    console = Console(width=200, record=True, quiet=True)
    report.show(made, console)
    assert all(np.isfinite(row.snr) for row in made.layers)


def test_awq_and_searched_scales_of_experts_help_where_a_channel_is_loud():
    model, batches = mixture_model(), [texts(6)]
    formats = chosen(model.params, recipe_of([('layers/**/experts', INT4)]))
    noise = {}
    for how in (CalibrationConfig(), CalibrationConfig(factors='awq', weights='weighted_mse')):
        params = calibrated_params(model, formats, batches, how)
        kernels = weights_of(params, formats)
        compared = calibrate(CFG, model.params, batches, (), compared=tree_of(CFG, kernels))
        noise[how.factors] = {name: node_of(path_of(name), compared)['output']['noise'].sum() for name in NAMES}
    assert noise['awq']['up'] + noise['awq']['gate'] < 0.5 * (noise['none']['up'] + noise['none']['gate'])
    assert noise['awq']['down'] <= 1.05 * noise['none']['down']
    logits = forward(CFG, params, batches[0].tokens).hidden_BTD
    assert np.isfinite(np.asarray(logits)).all()


def test_a_model_of_another_family_and_percentiles_of_experts():
    model = jpt.load(MODELS / 'gpt_oss', dtype='float32', mtp=False)
    batch = texts(2)
    formats = chosen(model.params, recipe_of([('layers/**/experts', 'int8_tensor')]))
    params = calibrated_params(model, formats, [batch], CalibrationConfig())
    assert all((np.asarray(leaf.input_scale) > 0).all() for leaf in weights_of(params, formats).values())
    how = CalibrationConfig(inputs='percentile')
    with pytest.raises(ValueError, match='there are no histograms by expert'):
        quantize_model(model, recipe_of('fp8_tensor'), [batch], [batch], how)
