"""fp8_kv: scales by what calibration saw, or a cast; what is reported and written; names in a config."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import CFG, small_model, texts

import jpt
from jpt.config import from_config_dict
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from
from jpt.models.cache import init_cache
from jpt.models.transformer import forward
from jpt.quant.recipes import recipe_of
from jpt.quant.tensors import QTensor
from jpt.quantization import report
from jpt.quantization.run import quantize_model
from jpt.quantization.settings import CalibrationConfig, QuantizeConfig

NOTHING = recipe_of([('layers/**', None)])
ROWS = 6


def largest_kept(batch):
    """{name: [layers]} of |keys| and |values| of real tokens, from the cache that one pass fills."""
    model = small_model()
    inputs = batch.tokens, batch.positions, batch.segment_ids
    cache = forward(CFG, model.params, *inputs, init_cache(CFG, ROWS, 12, 'float32')).cache
    real = batch.segment_ids > 0
    (entry,) = cache.layers[0]
    keys = np.where(real[None, :, None, None, :], np.abs(entry.keys), 0)
    values = np.where(real[None, :, None, :, None], np.abs(entry.values), 0)
    return {'k': keys.max((1, 2, 3, 4)), 'v': values.max((1, 2, 3, 4))}


def test_scales_take_the_largest_to_448(tmp_path):
    batch = texts(ROWS)
    made = quantize_model(small_model(), NOTHING, [batch], [batch], kv_cache='fp8')
    found, wanted = made.model.params['layers'][0][0]['attn'], largest_kept(batch)
    assert made.model.config == dataclasses.replace(CFG, kv_cache='fp8')
    for name in 'kv':
        assert found[f'{name}_scale'].dtype == 'float32'
        np.testing.assert_allclose(found[f'{name}_scale'], wanted[name] / 448, rtol=1e-5)
    assert made.cache.format == 'fp8'
    assert made.cache.bytes == (3 * 2 * 2 * 4 * 4, 3 * 2 * 2 * 4)  # layers, both, heads, width, bytes of one
    rows = made.cache.tensors
    assert {(row.layer, row.name) for row in rows} == {(layer, name) for layer in range(3) for name in 'kv'}
    assert [row.amax for row in rows] == sorted((row.amax for row in rows), reverse=True)
    for row in rows:
        assert row.amax == pytest.approx(wanted[row.name][row.layer], rel=1e-5)
        assert row.scale == np.float32(np.float64(np.float32(row.amax)) / 448)  # rounded once
        assert not row.beyond
    report.write(made, tmp_path)
    assert (tmp_path / report.PLOT_FILE).read_bytes().startswith(b'\x89PNG')
    original, rounded = made.models
    assert original.kl == pytest.approx(0, abs=1e-6)
    assert rounded.kl > 1e-6
    for one, other in zip(
        jax.tree.leaves(small_model().params), jax.tree.leaves(_without_scales(made.model.params)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def _without_scales(params):
    layer = params['layers'][0][0]
    attention = {name: part for name, part in layer['attn'].items() if name not in ('k_scale', 'v_scale')}
    return params | {'layers': [[layer | {'attn': attention}]]}


def test_a_cast_has_scales_of_1_and_says_what_it_clips():
    model = small_model()
    params = jax.tree.map(lambda leaf: leaf, model.params)
    kernel = params['layers'][0][0]['attn']['v']['kernel']
    params['layers'][0][0]['attn']['v']['kernel'] = kernel.at[1].multiply(100)
    loud = dataclasses.replace(model, params=params)
    batch = texts(ROWS)
    made = quantize_model(loud, NOTHING, [batch], [batch], kv_cache='fp8_cast')
    np.testing.assert_array_equal(made.model.params['layers'][0][0]['attn']['k_scale'], np.ones(3, 'f'))
    assert made.cache.tensors[0][:2] == (1, 'v')
    assert [row.beyond for row in made.cache.tensors] == [row.amax > 448 for row in made.cache.tensors]
    assert made.cache.tensors[0].beyond
    fitted = quantize_model(loud, NOTHING, [batch], [batch], kv_cache='fp8')
    assert fitted.models[1].kl < made.models[1].kl / 2


def test_what_is_not_finite_and_what_is_nothing():
    batch, model = texts(ROWS), small_model()
    params = jax.tree.map(lambda leaf: leaf, model.params)
    kernel = params['layers'][0][0]['attn']['v']['kernel']
    params['layers'][0][0]['attn']['v']['kernel'] = kernel.at[1].set(0)
    silent = dataclasses.replace(model, params=params)
    made = quantize_model(silent, NOTHING, [batch], [batch], kv_cache='fp8')
    assert made.model.params['layers'][0][0]['attn']['v_scale'][1] == 1
    assert np.isfinite(made.models[1].kl)
    params['layers'][0][0]['attn']['v']['kernel'] = jnp.asarray(kernel).at[2].set(jnp.inf)
    with pytest.raises(ValueError, match='layer 2: v holds NaN or infinities over the calibration data'):
        quantize_model(dataclasses.replace(model, params=params), NOTHING, [batch], [batch], kv_cache='fp8')
    with pytest.raises(ValueError, match='nothing is quantized'):
        quantize_model(model, NOTHING, [batch], [batch])


def test_the_teacher_with_weights_and_cache(tmp_path):
    """Weights in FP8 and the cache: hardly farther off than by the weights alone. Saved, exported, and generated from
    with no flag; what is rounded already is not measured."""
    teacher = jpt.load('quickstart')
    calibration, held_out = batches_from(teacher, TextConfig(rows=4, length=128, batch_size=4))
    made = quantize_model(teacher, recipe_of('fp8_tensor'), calibration, held_out, kv_cache='fp8')
    assert 0 < made.models[1].kl < 0.02
    report.write(made, tmp_path)
    said = json.loads((tmp_path / report.JSON_FILE).read_text())['kv_cache']
    assert said['bytes_per_token'] == {'original': 2560, 'quantized': 1280}  # bfloat16: 4 layers, k and v, 10 of 32
    assert said['tensors'][0] == {**made.cache.tensors[0]._asdict(), 'clipped': False}
    made.model.export(tmp_path / 'hf')
    made.model.save(tmp_path / 'jpt')
    texts = [
        one.generate(['def main():'], max_new_tokens=8, temperature=0.0)[0].token_ids
        for one in (made.model, jpt.load(tmp_path / 'hf'), jpt.load(tmp_path / 'jpt'))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert isinstance(jpt.load(tmp_path / 'hf').params['layers'][0][0]['attn']['k']['kernel'], QTensor)
    dense = jpt.load(tmp_path / 'jpt', dtype='float32')  # of weights; the cache stays
    with pytest.raises(ValueError, match="in fp8 already: expected 'as_it_is'"):
        quantize_model(dense, NOTHING, calibration, held_out, kv_cache='fp8')
    how = CalibrationConfig(weights='mse')
    with pytest.raises(ValueError, match='no weight is quantized: expected the defaults'):
        quantize_model(teacher, NOTHING, calibration, held_out, how, kv_cache='fp8')


def test_names_in_the_config():
    path = pathlib.Path(__file__).parents[2] / 'configs' / 'quantize.py'
    spec = importlib.util.spec_from_file_location('quantize_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for options, cache, recipe in (
        ('some/model', 'as_it_is', recipe_of('fp8_block')),
        ('some/model,fp8_kv', 'fp8', NOTHING),
        ('some/model,nvfp4,fp8_kv', 'fp8', recipe_of('nvfp4')),
        ('some/model,int8,fp8_kv_cast', 'fp8_cast', recipe_of('int8')),
    ):
        config = from_config_dict(QuantizeConfig, module.get_config(options), 'config')
        assert (config.model, config.kv_cache, config.choices()) == ('some/model', cache, recipe)
    with pytest.raises(ValueError, match='expected MODEL,RECIPE or MODEL,RECIPE,CACHE'):
        module.get_config('some/model,int8,nvfp4')
