"""Names of tensors: what a family's table cannot mean is refused, with the parameters and the tensor."""

import dataclasses
import functools
import json
import math
import pathlib

import pytest

from jpt.models import names
from jpt.models.families import FAMILIES, config_from_hf
from jpt.models.families.dialect import Stored
from jpt.models.names import leaves

MODELS = pathlib.Path(__file__).parents[1] / 'golden' / 'models'
UP = 'mlp.experts.up'


@functools.cache
def config_of(name: str):
    return config_from_hf(json.loads((MODELS / name / 'config.json').read_text()))


def leaves_with(monkeypatch: pytest.MonkeyPatch, name: str, **changes: str | Stored | None):
    """The leaves of a golden model whose family has other entries in its table."""
    cfg = config_of(name)
    family = FAMILIES[cfg.family]
    entries = dict(family.dialect.layer) | {key.replace('__', '.'): value for key, value in changes.items()}
    layer = {key: value for key, value in entries.items() if value is not None}
    dialect = dataclasses.replace(family.dialect, layer=layer)
    monkeypatch.setitem(names.FAMILIES, cfg.family, dataclasses.replace(family, dialect=dialect))
    return leaves.__wrapped__(cfg)


@pytest.mark.parametrize('name', ['gpt_oss', 'gpt2', 'llama4_text', 'nemotron_h_moe', 'qwen3_moe'])
def test_the_rows_of_every_tensor_are_those_of_its_leaves(name: str) -> None:
    """Apart, as leaves() asserts; and together they are the whole tensor."""
    held: dict[str, int] = {}
    whole: dict[str, int] = {}
    for leaf in leaves(config_of(name)):
        for source in leaf.sources:
            held[source.name] = held.get(source.name, 0) + math.prod(leaf.own_shape)
            whole[source.name] = math.prod(source.stored_shape(leaf.own_shape))
    assert held == whole


@pytest.mark.parametrize(
    ('name', 'changes', 'words'),
    [
        ('llama', {'attn__k': 'self_attn.q_proj'}, ['attn/q/kernel', 'attn/k/kernel', '0.self_attn.q_proj.weight']),
        ('qwen3_moe', {'mlp__experts__up': 'mlp.experts.{e}.gate_proj'}, ['experts/gate', 'experts/up', 'gate_proj']),
        (
            'gpt_oss',
            {'mlp__experts__up__kernel': Stored('mlp.experts.gate_up_proj', True, (UP, UP), interleaved=True)},
            ['experts/gate/kernel', 'experts/up/kernel', 'mlp.experts.gate_up_proj'],
        ),
        ('gpt2', {'attn__v': Stored('attn.c_attn', True, ('attn.v', 'attn.q', 'attn.k'))}, ['attn/q', 'attn/v']),
    ],
    ids=['whole', 'apart', 'interleaved', 'beside'],
)
def test_two_leaves_in_the_same_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict, words: list[str]
) -> None:
    with pytest.raises(ValueError, match='the same rows of the tensor') as caught:
        leaves_with(monkeypatch, name, **changes)
    for word in (config_of(name).family, *words):
        assert word in str(caught.value)


def test_a_parameter_without_a_name_is_an_error_that_names_it_and_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r'olmo2 has no tensor name for the parameter attn_post_norm\.scale: expected'):
        leaves_with(monkeypatch, 'olmo2', attn_post_norm=None)
