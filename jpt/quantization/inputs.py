"""What calibration measures of the inputs of weights, and which weights read the same input; by the weights' paths."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jpt.kernels.low_precision import E4M3_MAX
from jpt.models.calibration import Calibration
from jpt.models.config import ModelConfig
from jpt.quant.formats import ELEMENTS, Format
from jpt.quant.histogram import percentile_of
from jpt.quant.statistics import HISTOGRAM, LARGEST

# Maps that read what the module they are part of is given, so those of one module read the same: queries, keys and
# values, the first maps of latent attention, a gate and what it gates, the inputs of a state space.
READERS = frozenset({'q', 'k', 'v', 'q_down', 'kv_down', 'gate', 'up', 'x', 'b', 'c', 'dt'})


def group_of(path: str) -> str:
    """A name for the input of a weight, 'layers/0.0/attn' of 'layers/0.0/attn/q/kernel' and '.../attn/k/kernel'."""
    module, name, _ = path.rsplit('/', 2)
    return module if name in READERS else f'{module}/{name}'


def groups_of(formats: Mapping[str, Format]) -> dict[str, list[str]]:
    """The weights that read the same input, by its name: they get one factor, which could be made part of the norm or
    of the weight that stands before all of them."""
    found: dict[str, list[str]] = {}
    for path in formats:
        found.setdefault(group_of(path), []).append(path)
    return found


def second_groups(formats: Mapping[str, Format]) -> list[list[str]]:
    """The weights that share a second scale, where they have one: those of one input and one kind of scale.

    Readers that compute queries, keys and values in one product have one for all of them (vLLM, TensorRT-LLM).
    """
    found: dict[tuple[str, str], list[str]] = {}
    for path, form in formats.items():
        if form.has_second:
            found.setdefault((group_of(path), form.scale), []).append(path)
    return list(found.values())


def place_of(path: str) -> tuple[int, int, list[str]]:
    """(segment, kind, names of modules) of 'layers/0.0/attn/q/kernel'."""
    _, place, *modules, _ = path.split('/')
    segment, kind = place.split('.')
    return int(segment), int(kind), modules


def node_of(path: str, statistics: Calibration) -> dict[str, Any] | None:
    """What was measured of the linear layer with this weight; None where nothing was."""
    segment, kind, modules = place_of(path)
    node: Any = statistics.layers[segment][kind]
    for module in modules:
        node = node.get(module)
        if node is None:
            return None
    return node


def input_of(path: str, statistics: Calibration | None) -> dict[str, np.ndarray] | None:
    """The statistics [R, in], of experts [R, E, in], of what this weight reads; None where they were not measured."""
    node = None if statistics is None else node_of(path, statistics)
    return None if node is None else node.get('input')


def mean_of(path: str, statistics: Calibration, name: str) -> np.ndarray:
    """The mean over tokens of a sum of `input_of`; 0 for an expert that saw none."""
    node = node_of(path, statistics)
    assert node is not None
    tokens = np.maximum(node['tokens'], 1)[..., None] if 'tokens' in node else statistics.tokens
    return node['input'][name] / tokens


def unseen_experts(paths: Iterable[str], statistics: Calibration) -> dict[str, list[tuple[int, int]]]:
    """(repeat, expert) of the experts that no token went to, by the path of their weight."""
    found = {}
    for path in paths:
        node = node_of(path, statistics)
        if node is not None and 'tokens' in node and not node['tokens'].all():
            found[path] = [(int(repeat), int(expert)) for repeat, expert in np.argwhere(node['tokens'] == 0)]
    return found


def check_inputs(formats: Mapping[str, Format], statistics: Calibration) -> None:
    """Whether inputs are numbers, and whether weights of a group did read the same.

    Raises:
        ValueError: an input that is not finite, or two weights of a group with other inputs.
    """
    for group, members in groups_of(formats).items():
        found = [read for path in members if (read := input_of(path, statistics)) is not None]
        for path, read in zip(members, found, strict=False):
            for name, values in read.items():
                if not np.isfinite(values).all():
                    layers = sorted({int(at[0]) for at in np.argwhere(~np.isfinite(values))})
                    raise ValueError(
                        f'calibration: inputs of {path} are not finite in repeats {layers}: expected a model that is '
                        f'finite on the calibration text'
                    )
                # Sums of the same numbers may be made in another order for each layer that reads them.
                if name != HISTOGRAM and not np.allclose(values, found[0][name], rtol=1e-3):
                    raise ValueError(f'calibration: {path} and {members[0]} are to read the same, {group}, and do not')


def tree_of(cfg: ModelConfig, leaves: Mapping[str, Any], name: str = 'kernel') -> dict[str, Any]:
    """A tree like a model's parameters with some weights only, or with something else of this name in their places."""
    layers: list[list[dict[str, Any]]] = [[{} for _ in segment.kinds] for segment in cfg.segments]
    for path, leaf in leaves.items():
        segment, kind, modules = place_of(path)
        node = layers[segment][kind]
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return {'layers': layers}


def input_limits(
    formats: Mapping[str, Format],
    statistics: Calibration | None,
    factors: Mapping[str, np.ndarray],
    percent: float | None = None,
) -> dict[str, np.ndarray]:
    """What inputs are rounded within, [R] or [R, E] float32, by weight, where inputs have one scale known beforehand.

    It is their largest |x|, or where `percent` is given the |x| that so many of 100 elements do not exceed, of the
    inputs multiplied by their factor. An expert that read nothing takes the largest of its layer. Statistics hold
    LARGEST of the inputs as they are, or the HISTOGRAM of the multiplied ones.
    """
    found = {}
    for path, form in formats.items():
        read = input_of(path, statistics)
        if not form.takes_input_scale or read is None:
            continue
        if percent is not None:
            found[path] = percentile_of(read[HISTOGRAM], percent)
        else:
            largest = np.max(read[LARGEST] * factors.get(path, 1.0), axis=-1)
            if largest.ndim > 1:
                largest = np.where(largest > 0, largest, np.max(largest, axis=-1, keepdims=True))
            found[path] = largest.astype(np.float32)
    return found


def input_scale(limit: np.ndarray, form: Format) -> np.ndarray:
    """The scale [...] of inputs within these limits; 1 where nothing but zeros was read."""
    largest = ELEMENTS[form.operand].largest * (E4M3_MAX if form.scale == 'e4m3' else 1)
    return np.where(limit > 0, limit / np.float32(largest), np.float32(1))


def weights_of(params: Any, formats: Mapping[str, Format]) -> dict[str, jax.Array]:
    """The weights that have a format, by path."""
    found = {}
    for path in formats:
        segment, kind, modules = place_of(path)
        node = params['layers'][segment][kind]
        for module in modules:
            node = node[module]
        found[path] = node['kernel']
    return found


def real_tokens(batches: Sequence[Any]) -> int:
    """How many tokens of the batches are no padding."""
    return sum(int((batch.segment_ids > 0).sum()) for batch in batches)
