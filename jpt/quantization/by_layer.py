"""Recipes that name layers by their numbers: 'layers.3/mlp/down' is the weight of layer 3, whatever it is stacked with.

Weights of one kind of layer lie in one stack and have one format. Where a recipe wants several, the model is cut into
more segments (jpt/models/splitting.py), and the recipe becomes one of stacks.
"""

import dataclasses
import re

from jpt.model import Model
from jpt.models.splitting import places, restacked, split
from jpt.quant.dot import is_weight
from jpt.quant.formats import Format
from jpt.quant.paths import paths, select
from jpt.quant.recipes import NUMBERED, Choice, Recipe, may_be_quantized


def by_layer(model: Model, recipe: Recipe, place: str = 'recipe') -> tuple[Model, Recipe]:
    """The model in segments of layers whose formats are alike, and the recipe for it; both themselves where no pattern
    begins with 'layers.N'.

    Raises:
        ValueError: a pattern that covers nothing.
    """
    if not any(pattern.startswith(NUMBERED) for pattern, _ in recipe):
        return model, recipe
    stacks = [path for path in paths(model.params, is_weight) if may_be_quantized(path)]
    layers: dict[int, dict[str, tuple[str, str]]] = {}  # of a layer, by the name in it: its two paths
    for number, ((segment, kind), _) in enumerate(places(model.config)):
        prefix = f'layers/{segment}.{kind}/'
        own = [path.removeprefix(prefix) for path in stacks if path.startswith(prefix)]
        layers[number] = {name: (prefix + name, f'{NUMBERED}{number}/{name}') for name in own}
    everything = list(dict.fromkeys(path for each in layers.values() for both in each.values() for path in both))
    formats: dict[str, Format | None] = {}
    for at, (pattern, form) in enumerate(recipe):
        _check_numbers(pattern, len(layers), f'{place}.{at}')
        covered = select([pattern], everything, f'{place}.{at}')
        for each in layers.values():
            formats |= {path: form for stack, path in each.values() if stack in covered or path in covered}
    marks = [tuple((name, formats.get(path)) for name, (_, path) in layers[n].items()) for n in sorted(layers)]
    cfg = split(model.config, marks)
    choices = {}
    for number, ((segment, kind), _) in enumerate(places(cfg)):
        for name, (_, path) in layers[number].items():
            choices[f'layers/{segment}.{kind}/{name}'] = formats.get(path)
    made = dataclasses.replace(model, config=cfg, params=restacked(model.config, model.params, cfg))
    return made, tuple(Choice(path, form) for path, form in choices.items())


def _check_numbers(pattern: str, count: int, place: str) -> None:
    """Raises ValueError where a pattern names a layer that there is not, be it beside others that there are."""
    named = re.match(r'layers\.(?:(\d+)|\{([\d,]+)\})/', pattern)
    numbers = [] if named is None else [int(number) for number in (named[1] or named[2]).split(',') if number]
    beyond = [number for number in numbers if number >= count]
    if beyond:
        raise ValueError(f'{place}: {pattern!r}: there is no layer {beyond[0]}: expected numbers from 0 to {count - 1}')
