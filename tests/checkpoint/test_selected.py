"""Some layers of a model: the tensors are those of the whole one, renumbered; what makes no model is refused."""

import pathlib
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import jpt
from jpt.checkpoint.opening import open_model
from jpt.checkpoint.selected import SelectedLayers
from jpt.convert import convert, parse_layers

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'


def layers_of(name):
    return open_model(MODELS / name).source.cfg.num_layers


CASES = {
    'llama': 'every second',
    'gemma3_text': 'every second',
    'gpt2': 'last',
    'gpt_oss': 'last two',
    'nemotron_h_moe': 'all but the second',
    'deepseek_v3': 'all but the last',
}
CHOICES = {
    'every second': lambda count: range(0, count, 2),
    'last': lambda count: [count - 1],
    'last two': lambda count: [count - 2, count - 1],
    'all but the second': lambda count: [0, *range(2, count)],
    'all but the last': lambda count: range(count - 1),
}


@pytest.mark.parametrize('name', CASES)
def test_tensors_are_those_of_the_layers_that_stay(name, tmp_path):
    """By their names and bytes in the files; everything around the layers is as it was."""
    kept = list(CHOICES[CASES[name]](layers_of(name)))
    convert(MODELS / name, tmp_path / 'small', 'hf', layers=kept)
    whole, small = load_file(MODELS / name / 'model.safetensors'), load_file(tmp_path / 'small' / 'model.safetensors')
    wanted = {}
    for tensor, values in whole.items():
        found = re.match(r'(.*?(?:layers|h)\.)(\d+)(\..*)', tensor)
        if found is None:
            wanted[tensor] = values
        elif int(found[2]) in kept:
            wanted[f'{found[1]}{kept.index(int(found[2]))}{found[3]}'] = values
    assert small.keys() == wanted.keys()
    for tensor, values in wanted.items():
        np.testing.assert_array_equal(small[tensor], values, err_msg=tensor)
    model = jpt.load(tmp_path / 'small')
    assert model.config.num_layers == len(kept)
    assert np.isfinite(np.asarray(model.logits([[1, 2, 3, 4]]))).all()


def test_all_layers_are_the_whole_model():
    source = open_model(MODELS / 'gemma3_text').source
    assert SelectedLayers(source, range(source.cfg.num_layers)).cfg == source.cfg


@pytest.mark.parametrize(
    ('name', 'layers', 'message'),
    [
        ('llama', [], r'layers=\(\): expected numbers that ascend, at least one'),
        ('llama', [1, 0], r'layers=\(1, 0\): expected numbers that ascend'),
        ('llama', [0, 99], r'layers=\(0, 99\): expected numbers from 0 to '),
    ],
)
def test_layers_that_are_none_are_refused(name, layers, message):
    with pytest.raises(ValueError, match=message):
        SelectedLayers(open_model(MODELS / name).source, layers)


def test_numbers_and_ranges():
    assert parse_layers('0-3,6') == (0, 1, 2, 3, 6)
    assert parse_layers('5') == (5,)
    with pytest.raises(ValueError, match="--layers=0-: '0-': expected numbers and ranges"):
        parse_layers('0-')
