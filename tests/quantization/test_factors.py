"""Factors of inputs beside numpy on inputs captured by hand; that weights of one input share them; that they help."""

import jax
import numpy as np
import pytest
from captured import CFG, GROUPS, divided, inputs, path_of, rounded, small_model, texts, weight

from jpt.models.calibration import calibrate
from jpt.quant.formats import FORMATS, Format
from jpt.quant.input_factors import EXPONENTS, awq_factor, smoothquant_factor
from jpt.quant.recipes import chosen, recipe_of
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.factors import awq_factors, smoothquant_factors
from jpt.quantization.inputs import group_of
from jpt.quantization.settings import CalibrationConfig

ROWS = 6
INT4 = Format('int4', 1, 8)
STATISTICS = ('largest', 'absolute')


def formats_of(form: Format) -> dict[str, Format]:
    return chosen(small_model().params, recipe_of([('layers/**', form)]))


def measured(batches):
    model = small_model()
    return calibrate(CFG, model.params, batches, STATISTICS)


def smooth_by_hand(x: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """SmoothQuant's factor from inputs [tokens, in] and weights, element by element."""
    factor = np.ones(x.shape[1])
    for i in range(x.shape[1]):
        a, w = np.abs(x[:, i]).max(), max(np.abs(one[:, i]).max() for one in weights)
        if a > 2**-31:
            factor[i] = min(max(w ** (1 - alpha) / a**alpha, 1e-4), 1e4)
    return factor


def awq_by_hand(x: np.ndarray, weights: list[np.ndarray], columns: int) -> tuple[np.ndarray, dict[str, float]]:
    """AWQ's factor of the least error, and the error of every exponent, from inputs [tokens, in]."""
    tiny = np.finfo(np.float32).tiny
    shares = []
    for one in weights:
        size = np.abs(one.astype(np.float64))
        for row in size:
            blocks = [row[at : at + columns] for at in range(0, len(row), columns)]
            shares.append(np.concatenate([block / (block.max() + tiny) for block in blocks]))
    w_mean, x_mean = np.mean(shares, axis=0), np.abs(x).mean(0)
    tried = {'none': np.ones(x.shape[1])}
    for a in np.arange(11) / 10:
        s = np.clip(x_mean**a / (w_mean ** (1 - a) + tiny), 1e-4, 1e4)
        tried[f'{a:.1f}'] = 1 / (s / np.sqrt(s.max() * s.min()))
    errors = {}
    for name, factor in tried.items():
        factor = factor.astype(np.float32)
        off = 0.0
        for one in weights:
            numbers = rounded(one / factor, 7, columns) * factor.astype(np.float64)
            off += np.square(x @ (numbers - one.astype(np.float64)).T).sum()
        errors[name] = off
    return tried[min(errors, key=errors.get)], errors


@pytest.mark.parametrize('alpha', [0.5, 1.0])
def test_smoothquant_is_the_formula_on_captured_inputs(alpha):
    batches = [texts(ROWS)]
    found = smoothquant_factors(small_model().params, formats_of(FORMATS['int8']), measured(batches), alpha)
    for group, members in GROUPS.items():
        for layer, read in enumerate(inputs(ROWS)):
            wanted = smooth_by_hand(read[group], [weight(name, layer) for name in members], alpha)
            np.testing.assert_allclose(found[path_of(group)][layer], wanted, rtol=1e-4)


def test_awq_is_the_best_of_its_grid_on_captured_inputs():
    batch = texts(ROWS)
    formats = formats_of(INT4)
    found = awq_factors(small_model(), formats, measured([batch]), [batch])
    chosen_ones = set()
    for group, members in GROUPS.items():
        for layer, read in enumerate(inputs(ROWS)):
            wanted, errors = awq_by_hand(read[group], [weight(name, layer) for name in members], 8)
            np.testing.assert_allclose(found[path_of(group)][layer], wanted, rtol=1e-4, err_msg=f'{group} {layer}')
            best = min(errors, key=errors.get)
            chosen_ones.add(best)
            if group in ('attn/q', 'mlp/up'):  # where two channels are loud
                assert errors[best] < 0.5 * errors['none']
    assert len(chosen_ones) > 2
    # In other batches, the same.
    others = awq_factors(small_model(), formats, measured(divided(batch, 2)), divided(batch, 2))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), others, found)


def test_weights_that_read_the_same_input_share_one_factor():
    statistics = measured([texts(2)])
    found = smoothquant_factors(small_model().params, formats_of(FORMATS['int8']), statistics, 0.5)
    for group, members in GROUPS.items():
        assert all(found[path_of(name)] is found[path_of(group)] for name in members)
    assert len({id(factor) for factor in found.values()}) == len(GROUPS)
    assert group_of('layers/1.0/attn/kv_down/kernel') == group_of('layers/1.0/attn/q_down/kernel')
    assert group_of('layers/1.0/attn/kv_up/kernel') != group_of('layers/1.0/attn/q_up/kernel')
    assert group_of('layers/0.0/mlp/shared/gate/kernel') != group_of('layers/0.0/mlp/experts/gate/kernel')


def noises(form: Format, factors: str):
    """The error of every layer's output, by group, over its signal."""
    model, batches = small_model(), [texts(ROWS)]
    params = calibrated_params(model, formats_of(form), batches, CalibrationConfig(factors=factors))
    layers = calibrate(CFG, model.params, batches, (), compared=params).layers[0][0]
    outputs = {name: layers[name.split('/')[0]][name.split('/')[1]]['output'] for name in GROUPS}
    return {name: output['noise'] / output['signal'] for name, output in outputs.items()}


def test_loud_channels_are_no_loss_any_more():
    """Smoothing where inputs have one scale of eight bits, AWQ where weights have four."""
    for form, factors in ((FORMATS['int8_tensor'], 'smoothquant'), (INT4, 'awq')):
        plain, better = noises(form, 'none'), noises(form, factors)
        for name in ('attn/q', 'mlp/up'):
            assert (better[name] < 0.5 * plain[name]).all(), (factors, name, better[name] / plain[name])


def test_channels_without_inputs_or_weights_and_limits():
    x, w = np.array([0.0, 2.0**-31, 1.0, 1e9, 1e-9]), np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    np.testing.assert_array_equal(smoothquant_factor(x, w, 0.5), np.float32([1, 1, 1, 1e-4, 1e4]))
    np.testing.assert_array_equal(awq_factor(np.zeros((2, 3)), np.ones((2, 3)), 0.3), np.ones((2, 3)))
    for exponent in EXPONENTS:
        found = awq_factor(np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 0.5]), exponent)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found.max() * found.min(), 1, rtol=1e-5)


def test_what_cannot_be_smoothed_is_an_error():
    with pytest.raises(ValueError, match='expected a format that rounds the inputs of layers'):
        smoothquant_factors(small_model().params, formats_of(FORMATS['int4_weights']), measured([texts(2)]), 0.5)
