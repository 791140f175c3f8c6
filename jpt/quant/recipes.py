"""Recipes: which weights of a model get which format, as a short list of patterns, and carrying it out on a tree.

The weights of linear layers in the model's layers can be quantized. Routers, norms, embeddings, the head and modules
that predict further tokens stay as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jpt.kernels.te import require
from jpt.quant.dot import LoraKernel, Transposed, is_weight
from jpt.quant.formats import FORMATS, Format, format_of
from jpt.quant.paths import map_with_path, paths, select
from jpt.quant.products import quantized
from jpt.quant.tensors import FakeQuant, Gradients, QTensor, quantize

EVERYTHING = 'layers/**'
NUMBERED = 'layers.'  # begins a pattern that names layers by their numbers, see jpt/quantization/by_layer.py
KEEP = 'none'  # in place of a format, where a user names one: these weights stay as they are


class Choice(NamedTuple):
    """The weights that a pattern covers, see jpt.quant.paths, and their format; None: they stay as they are."""

    pattern: str
    format: Format | None


Recipe = tuple[Choice, ...]
Given = str | Format | Mapping[str, Any] | None


def recipe_of(given: str | Sequence[tuple[str, Given]], place: str = 'recipe') -> Recipe:
    """A recipe from the name of a format, for all layers, or from pairs of pattern and format, the last that covers a
    weight holding for it.

    Raises:
        ValueError: no pairs, or a format that there is not.
    """
    pairs = [(EVERYTHING, given)] if isinstance(given, str) else list(given)
    if not pairs:
        raise ValueError(f'{place} is empty: expected one of {", ".join(FORMATS)}, or pairs of pattern and format')
    found = []
    for at, pair in enumerate(pairs):
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(f'{place}.{at}={pair!r}: expected a pattern and a format')
        form = None if pair[1] is None else format_of(pair[1], f'{place}.{at}')
        found.append(Choice(pair[0], form))
    return tuple(found)


def chosen(params: Any, recipe: Recipe, place: str = 'recipe') -> dict[str, Format]:
    """The format of every weight that a recipe quantizes, by path, in tree order; `params` may hold shapes only.

    Raises:
        ValueError: a pattern that covers no weight, a weight that is quantized already or has an adapter, a shape that
            the format does not take.
    """
    weights = {path: leaf for path, leaf in _leaves(params).items() if may_be_quantized(path)}
    found: dict[str, Format | None] = dict.fromkeys(weights)
    for at, (pattern, form) in enumerate(recipe):
        found |= dict.fromkeys(select([pattern], list(weights), f'{place}.{at}'), form)
    formats = {path: form for path, form in found.items() if form is not None}
    for path, form in formats.items():
        if isinstance(weights[path], QTensor | FakeQuant | LoraKernel | Transposed):
            kind = type(weights[path]).__name__
            raise ValueError(f'{place}: {path} is a {kind}: expected weights as they are; ask for a dtype when loading')
        form.check(weights[path].shape, f'{place}: {path}')
    if not formats:
        raise ValueError(f'{place}: nothing is quantized: the last choice that covers a weight is None everywhere')
    return formats


def may_be_quantized(path: str) -> bool:
    """Whether a leaf is the weight of a linear layer that a recipe may cover."""
    parts = path.split('/')
    return parts[0] == 'layers' and parts[-1] == 'kernel' and 'router' not in parts


def left_out(params: Any, formats: Mapping[str, Format]) -> list[str]:
    """The matrices that stay as they are, by path: for a report."""
    kept = {path for path, leaf in _leaves(params).items() if path not in formats}
    return [path for path in paths(params, is_weight) if path in kept and path.endswith(('kernel', 'embedding'))]


def quantized_tree(
    params: Any,
    formats: Mapping[str, Format],
    kernel: Callable[[str, jax.Array, Format], Any] = lambda path, weight, form: quantize(weight, form),
) -> Any:
    """The tree in which every weight that has a format is `kernel(path, weight, format)`."""

    def one(path: str, leaf: Any) -> Any:
        return kernel(path, leaf, formats[path]) if path in formats else leaf

    return map_with_path(one, params, is_leaf=is_weight)


def in_training(
    params: Any,
    formats: Mapping[str, Format],
    gradients: Gradients,
    static: Mapping[str, Mapping[str, Any]] | None = None,
    clipped: bool = False,
) -> Any:
    """The tree in which every weight that has a format is trained through its rounding.

    static: by path, scales of a FakeQuant that stay as they are, by name. clipped: as in FakeQuant.

    Raises:
        ImportError: gradients='te' where Transformer Engine is not.
        ValueError: gradients='te' of experts.
    """
    if gradients == 'te':
        require()
        experts = [path for path in formats if 'experts' in path.split('/')]
        if experts:
            raise ValueError(f"gradients='te': {experts[0]}: expected 'tensor', or a recipe that leaves experts out")

    def kernel(path: str, weight: jax.Array, form: Format) -> FakeQuant:
        return FakeQuant(weight, **(static or {}).get(path, {}), format=form, gradients=gradients, clipped=clipped)

    return quantized_tree(params, formats, kernel)


@jax.jit
def packed(params: Any) -> Any:
    """The tree with every FakeQuant as the QTensor that it computes as."""
    return jax.tree.map(
        lambda leaf: quantized(leaf) if isinstance(leaf, FakeQuant) else leaf, params, is_leaf=is_weight
    )


def masters(params: Any) -> Any:
    """The tree with every FakeQuant as the weight that is trained."""
    return jax.tree.map(lambda leaf: leaf.weight if isinstance(leaf, FakeQuant) else leaf, params, is_leaf=is_weight)


# What a run may end with, by FakeQuantConfig.result.
RESULTS: dict[str, Callable[[Any], Any]] = {'quantized': packed, 'weights': masters}


def _leaves(params: Any) -> dict[str, Any]:
    return dict(zip(paths(params, is_weight), jax.tree.leaves(params, is_leaf=is_weight), strict=True))
