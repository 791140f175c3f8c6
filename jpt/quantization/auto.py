"""Mixed precision chosen for a model: of several formats one per layer and group of weights, under a budget of bits."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jpt.data.batch import Batch
from jpt.model import Model
from jpt.quant.formats import Format
from jpt.quant.recipes import KEEP, Given, Recipe, chosen, recipe_of
from jpt.quantization.allocation import least
from jpt.quantization.by_layer import NUMBERED
from jpt.quantization.calibrated import calibrated_params
from jpt.quantization.checks import check_measurable, check_shards
from jpt.quantization.inputs import weights_of
from jpt.quantization.sensitivity import Group, by_gradient, by_kl, either, groups_by_layer
from jpt.quantization.settings import AutoConfig, CalibrationConfig

Say = Callable[[str], Any]
Pairs = tuple[tuple[str, str], ...]  # a recipe as a user writes it


class Weighed(NamedTuple):
    """A group of weights, and what each format would do to it."""

    layer: int
    name: str
    weights: int  # how many numbers
    bits: dict[str, float]  # of a weight, by the name of the format; what it does not fit is left out
    sensitivity: dict[str, float]  # likewise: nats per token
    chosen: str


class Automatic(NamedTuple):
    """A recipe that was chosen, and why."""

    recipe: Pairs  # as config.recipe takes it
    how: AutoConfig
    bits: float  # of a weight, over all that were to be chosen for
    sensitivity: float  # of all groups together
    groups: list[Weighed]

    def choices(self) -> Recipe:
        """The recipe."""
        return recipe_of([(pattern, _given(name)) for pattern, name in self.recipe])


def automatic(
    model: Model,
    recipe: Pairs,
    batches: Sequence[Batch],
    auto: AutoConfig,
    how: CalibrationConfig = CalibrationConfig(),  # noqa: B008 (frozen)
    say: Say = lambda line: None,
) -> Automatic:
    """A format for every group of weights that a recipe covers, such that their sensitivities add up to the least.

    Args:
        model: with weights as they are.
        recipe: which weights are chosen for: those to which it gives any format. The others are left alone.
        batches: calibration text.
        auto: the formats, the budget, and what measures sensitivity.
        how: scales are chosen.
        say: gets a line of progress at a time.

    Raises:
        ValueError: a recipe that does not fit the model, a budget below the narrowest formats, or a group that no
            format fits.
    """
    if any(pattern.startswith(NUMBERED) for pattern, _ in recipe):
        raise ValueError(f'auto: recipe {recipe}: expected patterns over all layers of a kind, without numbers')
    covered = chosen(model.params, recipe_of([(pattern, _given(name)) for pattern, name in recipe]))
    groups = groups_by_layer(model.config, covered)
    weights = weights_of(model.params, covered)
    sensitivity: dict[str, list[float]] = {KEEP: [0.0] * len(groups)}
    fits = {name: fitting(weights, name) for name in auto.formats}
    _check_budget(weights, auto)
    for name in auto.formats:
        check_measurable(model, fits[name], how)
    for name in auto.formats:
        if name != KEEP and fits[name]:
            say(f'sensitivity to {name}, by {auto.score}')
            sensitivity[name] = _sensitivity(model, fits[name], groups, batches, auto, how, say)
    weighed = []
    for at, group in enumerate(groups):
        options = [name for name in auto.formats if name == KEEP or all(path in fits[name] for path in group.paths)]
        if not options:
            raise ValueError(f'auto: layer {group.layer}, {group.name}: expected a format that fits it, as {KEEP!r}')
        size = sum(math.prod(weights[path].shape[1:]) for path in group.paths)
        bits = {name: sum(_bits(weights[path], name) for path in group.paths) / size for name in options}
        told = {name: sensitivity[name][at] for name in options}
        weighed.append(Weighed(group.layer, group.name, size, bits, told, options[0]))
    weighed = _decided(weighed, auto.bits)
    total = sum(each.weights for each in weighed)
    spent = sum(each.bits[each.chosen] * each.weights for each in weighed) / total
    loss = sum(each.sensitivity[each.chosen] for each in weighed)
    return Automatic((*recipe, *_pairs(weighed)), auto, spent, loss, weighed)


def _given(name: str) -> Given:
    return None if name == KEEP else name


def fitting(weights: Mapping[str, Any], name: str) -> dict[str, Format]:
    """The format by path, for the weights that it takes on the mesh that is set."""
    found: dict[str, Format] = {}
    for path, weight in weights.items() if name != KEEP else ():
        ((_, form),) = recipe_of(name)
        assert form is not None
        try:
            form.check(weight.shape, path)
            check_shards(path, weight, form)
        except ValueError:
            continue
        found[path] = form
    return found


def _sensitivity(
    model: Model,
    formats: Mapping[str, Format],
    groups: Sequence[Group],
    batches: Sequence[Batch],
    auto: AutoConfig,
    how: CalibrationConfig,
    say: Say,
) -> list[float]:
    """Of every group; 0 where the format does not fit it."""
    tensors: dict[str, Any] = weights_of(calibrated_params(model, formats, batches, how, say), formats)
    fit = [at for at, group in enumerate(groups) if all(path in formats for path in group.paths)]
    found = [0.0] * len(groups)
    if auto.score == 'kl':
        for at, value in zip(fit, by_kl(model, tensors, [groups[at] for at in fit], batches, say), strict=True):
            found[at] = value
        return found
    scores = by_gradient(model, tensors, batches, auto.seed)
    for at in fit:
        found[at] = float(sum(scores[path][groups[at].repeat] for path in groups[at].paths))
    return found


def _check_budget(weights: Mapping[str, Any], auto: AutoConfig) -> None:
    """Raises ValueError where every weight could stay as it is, so that nothing would be quantized."""
    own = sum(_bits(weight, KEEP) * weight.shape[0] for weight in weights.values())
    mean = own / sum(weight.size for weight in weights.values())
    if KEEP in auto.formats and mean <= auto.bits:
        raise ValueError(f'auto.bits={auto.bits}: expected less than the {mean:g} bits that weights have as they are')


def _bits(weight: Any, name: str) -> float:
    """Of one weight of a stack, its scales included."""
    shape, size = weight.shape[1:], math.prod(weight.shape[1:])
    if name == KEEP:
        return 8.0 * jnp.dtype(weight.dtype).itemsize * size
    ((_, form),) = recipe_of(name)
    assert form is not None
    return form.bits(shape) * size


def _decided(weighed: Sequence[Weighed], bits: float) -> list[Weighed]:
    """The groups with the formats that lose the least within the budget."""
    names = [list(each.bits) for each in weighed]
    costs = [[round(each.bits[name] * each.weights) for name in each.bits] for each in weighed]
    losses = [[each.sensitivity[name] for name in each.bits] for each in weighed]
    total = sum(each.weights for each in weighed)
    lowest = sum(min(each) for each in costs) / total
    if lowest > bits:
        raise ValueError(f'auto.bits={bits}: expected {lowest:.4f} at least, which the narrowest formats take')
    for each, values in zip(weighed, losses, strict=True):
        if not np.isfinite(values).all():
            raise ValueError(f'auto: layer {each.layer}, {each.name}: its sensitivity is no number: {each.sensitivity}')
    options = least(costs, losses, math.floor(bits * total))
    return [each._replace(chosen=own[at]) for each, own, at in zip(weighed, names, options, strict=True)]


def _pairs(weighed: Sequence[Weighed]) -> Pairs:
    """The choice as patterns over numbered layers: a pair for all layers whose group has the same format."""
    layers: dict[tuple[str, str], list[int]] = {}
    for each in weighed:
        layers.setdefault((each.name, each.chosen), []).append(each.layer)
    return tuple((f'{NUMBERED}{either(numbers)}/{name}', chosen) for (name, chosen), numbers in layers.items())
