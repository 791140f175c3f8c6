"""Scales of inputs and weights beside captured inputs; in any batches and on a mesh; what it does on a real model."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured import CFG, GROUPS, divided, inputs, path_of, small_model, texts, weight
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpt
from jpt.config import ConfigError, from_config_dict
from jpt.data.config import TextConfig
from jpt.evaluation.text import batches_from
from jpt.models.calibration import calibrate
from jpt.quant.formats import FORMATS, Format
from jpt.quant.histogram import percentile_of
from jpt.quant.paths import paths
from jpt.quant.recipes import chosen, recipe_of
from jpt.quant.tensors import QTensor, numbers_of
from jpt.quantization import report
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.inputs import check_inputs, second_groups, weights_of
from jpt.quantization.named import NAMED, named
from jpt.quantization.run import quantize_model
from jpt.quantization.settings import CalibrationConfig, QuantizeConfig

ROWS = 6
PERCENTILE = CalibrationConfig(inputs='percentile', percentile=97.0)


def formats_of(form: Format) -> dict[str, Format]:
    return chosen(small_model().params, recipe_of([('layers/**', form)]))


def calibrated(form: Format, how: CalibrationConfig, batches=None) -> dict[str, QTensor]:
    """The quantized weights by path."""
    model = small_model()
    params = calibrated_params(model, formats_of(form), batches or [texts(ROWS)], how)
    is_weight = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    leaves = zip(paths(params, is_weight), jax.tree.leaves(params, is_leaf=is_weight), strict=True)
    return {path: leaf for path, leaf in leaves if is_weight(leaf)}


def wanted_limit(x: np.ndarray, how: CalibrationConfig) -> float:
    """The largest |x| of captured inputs, or a percentile by sorting."""
    size = np.sort(np.abs(x).reshape(-1))
    share = 1.0 if how.inputs == 'max' else how.percentile / 100
    return size[int(np.ceil(share * len(size))) - 1]


@pytest.mark.parametrize('factors', ['none', 'smoothquant'])
@pytest.mark.parametrize('how', [CalibrationConfig(), PERCENTILE], ids=['max', 'percentile'])
def test_scales_of_inputs_are_those_of_captured_inputs(how, factors):
    how = dataclasses.replace(how, factors=factors)
    found = calibrated(FORMATS['int8_tensor'], how)
    for group, members in GROUPS.items():
        for layer, read in enumerate(inputs(ROWS)):
            for name in members:
                tensor = found[path_of(name)]
                x = read[group]
                if factors != 'none':
                    x = x * np.asarray(tensor.input_factor[layer], np.float64)
                tolerance = 1e-4 if how.inputs == 'max' else 2.0**-8 + 1e-4
                np.testing.assert_allclose(tensor.input_scale[layer], wanted_limit(x, how) / 127, rtol=tolerance)
            # One input, one scale, so that it is rounded once.
            assert len({float(found[path_of(name)].input_scale[layer]) for name in members}) == 1


def test_statistics_do_not_depend_on_batches_or_on_the_mesh():
    model, batch = small_model(), texts(8)
    statistics = ('largest', 'absolute', 'square', 'histogram')
    whole = calibrate(CFG, model.params, [batch], statistics)
    mesh = jax.make_mesh((4, 2), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.device_put(batch, NamedSharding(mesh, P('data')))
    shared = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, P(None, 'fsdp') if x.ndim == 3 else P())), model.params
    )
    for other in (
        calibrate(CFG, model.params, divided(batch, 2), statistics),
        calibrate(CFG, shared, [spread], statistics),
    ):
        assert other.tokens == whole.tokens
        for name in GROUPS:
            part, module = name.split('/')
            one, two = (each.layers[0][0][part][module]['input'] for each in (whole, other))
            for statistic in ('largest', 'absolute', 'square'):
                np.testing.assert_allclose(two[statistic], one[statistic], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(two['histogram'].sum(-1), one['histogram'].sum(-1))
            # Sums in another order may take a number over the border of a bin.
            np.testing.assert_allclose(
                percentile_of(two['histogram'], 99), percentile_of(one['histogram'], 99), rtol=2.0**-7
            )


def test_searched_scales_by_the_inputs_that_meet_the_weights():
    """The mean square of the output's error, as far as inputs are uncorrelated, falls with every kind of search."""
    form = Format('int4', 1, 8)
    errors = {}
    for kind in ('max', 'mse', 'weighted_mse'):
        found = calibrated(form, CalibrationConfig(weights=kind))
        plain = weighted = 0.0
        for group, members in GROUPS.items():
            for layer, read in enumerate(inputs(ROWS)):
                for name in members:
                    off = np.asarray(numbers_of(found[path_of(name)])[layer], np.float64) - weight(name, layer)
                    plain += np.square(off).sum()
                    weighted += (np.square(off) * np.square(read[group]).mean(0)).sum()
        errors[kind] = plain, weighted
    assert errors['mse'][0] < 0.95 * errors['max'][0]
    assert errors['mse'][0] <= errors['weighted_mse'][0]
    assert errors['weighted_mse'][1] < 0.95 * errors['mse'][1]


def test_inputs_that_are_no_numbers_or_not_shared_are_errors():
    formats, statistics = (
        formats_of(FORMATS['int8_tensor']),
        calibrate(CFG, small_model().params, [texts(2)], ('largest',)),
    )
    check_inputs(formats, statistics)
    read = statistics.layers[0][0]['attn']['k']['input']
    read['largest'] = read['largest'] * 2
    with pytest.raises(ValueError, match=r'attn/q/kernel and layers/0.0/attn/k/kernel are to read the same'):
        check_inputs(formats, statistics)
    params = jax.tree.map(jnp.copy, small_model().params)
    params['layers'][0][0]['mlp_norm']['scale'] = params['layers'][0][0]['mlp_norm']['scale'].at[1, 0].set(jnp.nan)
    broken = dataclasses.replace(small_model(), params=params)
    with pytest.raises(
        ValueError, match=r'mlp/\w+/kernel are not finite in repeats \[1, 2\]|not finite in repeats \[2\]'
    ):
        calibrated_params(broken, formats, [texts(2)], CalibrationConfig())


def test_settings_and_names():
    assert named('fp8_block') == ('fp8_block', CalibrationConfig())
    for name, (form, how) in NAMED.items():
        assert form in FORMATS
        assert how != CalibrationConfig()
        assert name not in FORMATS
    with pytest.raises(ValueError, match="recipe 'int4_qwa': expected one of int8_sq, int4_awq"):
        named('int4_qwa')
    with pytest.raises(ConfigError, match=r'percentile=0\.0: expected more than 0'):
        CalibrationConfig(percentile=0.0)
    with pytest.raises(ConfigError, match=r'alpha=2\.0: expected a number from 0 to 1'):
        CalibrationConfig(alpha=2.0)


def test_the_config_takes_recipes_and_formats_by_name():
    path = pathlib.Path(__file__).parents[2] / 'configs' / 'quantize.py'
    spec = importlib.util.spec_from_file_location('quantize_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for options, name in (
        ('quickstart', 'fp8_block'),
        ('some/model,int4_awq', 'int4_awq'),
        ('quickstart,int8', 'int8'),
    ):
        config = from_config_dict(QuantizeConfig, module.get_config(options), 'config')
        assert config.choices() == recipe_of(named(name).format)
        assert config.calibration == named(name).calibration
        assert config.model == options.split(',')[0]
        assert not config.auto.formats
    auto = from_config_dict(QuantizeConfig, module.get_config('quickstart,auto'), 'config').auto
    assert (auto.formats, auto.bits) == (('nvfp4', 'fp8_tensor', 'none'), 6.0)
    given = module.get_config('quickstart,int8_sq')
    given.calibration.alpha = 0.8
    assert from_config_dict(QuantizeConfig, given, 'config').calibration == CalibrationConfig(
        factors='smoothquant', alpha=0.8
    )


@pytest.fixture(scope='module')
def teacher():
    """The model that jpt ships, and a little of the standard library."""
    model = jpt.load('quickstart')
    return model, *batches_from(model, TextConfig(rows=8, length=128, batch_size=4))


def test_smoothing_brings_the_teacher_nearer_to_itself(teacher, tmp_path):
    model, calibration, held_out = teacher
    made = {}
    for name in ('int8_tensor', 'int8_sq'):
        form, how = named(name)
        made[name] = quantize_model(model, recipe_of(form), calibration, held_out, how)
    kl = {name: one.models[1].kl for name, one in made.items()}
    assert kl['int8_sq'] < 0.8 * kl['int8_tensor']
    worst = {name: min(row.snr for row in one.layers) for name, one in made.items()}
    assert worst['int8_sq'] > worst['int8_tensor'] + 2
    # What was moved into the weight comes back from a checkpoint, to the bit.
    made['int8_sq'].model.save(tmp_path / 'small')
    back = jpt.load(tmp_path / 'small')
    jax.tree.map(np.testing.assert_array_equal, back.params, made['int8_sq'].model.params)
    found = report.to_json(made['int8_sq'])
    assert found['calibration']['factors'] == 'smoothquant'
    json.dumps(found)


def test_searched_scales_never_raise_the_error_of_the_teachers_weights(teacher):
    model = teacher[0]
    formats = chosen(model.params, recipe_of('int4_weights'))
    errors = {}
    for kind in ('max', 'mse'):
        found = weights_of(calibrated_params(model, formats, [], CalibrationConfig(weights=kind)), formats)
        errors[kind] = {
            path: np.square(np.asarray(numbers_of(found[path]), np.float64) - np.asarray(own, np.float64)).sum((1, 2))
            for path, own in weights_of(model.params, formats).items()
        }
    for path, plain in errors['max'].items():
        assert (errors['mse'][path] < 0.95 * plain).all()


def test_second_scales_of_weights_that_read_the_same_are_one():
    """NVFP4: of q, k and v, and of gate and up, the largest of theirs; of others their own; also where scales are
    searched. Inputs have the second scale of their largest value."""
    for how in (CalibrationConfig(), CalibrationConfig(weights='mse')):
        found = calibrated(FORMATS['nvfp4'], how)
        own = {path: np.abs(weights_of(small_model().params, [path])[path]).max(axis=(1, 2)) for path in found}
        for members in (['attn/q', 'attn/k', 'attn/v'], ['mlp/gate', 'mlp/up'], ['attn/out'], ['mlp/down']):
            here = [f'layers/0.0/{name}/kernel' for name in members]
            largest = np.max([own[path] for path in here], axis=0).astype(np.float32)
            for path in here:
                np.testing.assert_array_equal(np.asarray(found[path].scale_2)[:, 0, 0], largest / np.float32(2688))
        assert len({own[f'layers/0.0/attn/{name}/kernel'][0] for name in 'qkv'}) == 3
    int8 = calibrated(FORMATS['int8_tensor'], CalibrationConfig())
    for path, weight_ in found.items():
        np.testing.assert_allclose(
            np.asarray(weight_.input_scale) * 2688, np.asarray(int8[path].input_scale) * 127, rtol=1e-6
        )


def test_second_scales_are_shared_by_weights_of_one_input_and_one_kind_of_scale():
    names = ('q', 'nvfp4'), ('k', 'w4a8'), ('v', 'nvfp4_weights'), ('out', 'nvfp4'), ('gate', 'fp8_block')
    formats = {f'layers/0.0/attn/{name}/kernel': FORMATS[form] for name, form in names}
    groups = [[path.split('/')[3] for path in group] for group in second_groups(formats)]
    assert groups == [['q', 'v'], ['k'], ['out']]
