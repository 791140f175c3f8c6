"""How much each channel, head, hidden dimension and layer of a model matters, from its activations over text.

Muralidharan et al. 2024 (Minitron, arXiv:2407.14679, section 2.2) score the parts of a model by the size of what they
pass on, from forward passes alone. Here, with means over all real tokens of the calibration data, however batched:

- MLP channel of a layer: mean |x| at the input of the down projection.
- query head of a layer: root mean square over tokens of |o|_2, its part of the output projection's input. (The paper
  sums the norms; a mean of squares is a sum over channels, which heads of any size can be cut from afterwards.)
- kv head of a layer, a group of query heads: the root of the sum of its heads' squares.
- hidden dimension: mean |x| of what query and up projections read, summed over all layers; in models that normalize
  before attention and MLP these are the outputs of the norms.
- layer: 1 - mean cosine of the angle between what enters and what leaves it (ShortGPT, Men et al. 2024,
  arXiv:2403.03853, equation 1).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jpt.checkpoint.sliced import Ids, not_sliced
from jpt.models.calibration import Calibration
from jpt.models.config import ModelConfig
from jpt.models.splitting import places


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """Scores of a model's parts, float64; the higher, the more a part matters.

    Only of layers where the model cannot be narrowed. `width_LD` is what each layer adds to the score of a hidden
    dimension. `streams_LD` is no score: its square in units of the mean square of all, where it enters each layer, and
    in one row more where it leaves the last.
    """

    layers_L: np.ndarray
    mlp_LF: np.ndarray | None = None
    heads_LN: np.ndarray | None = None
    width_LD: np.ndarray | None = None
    streams_LD: np.ndarray | None = None


def importance(cfg: ModelConfig, calibration: Calibration) -> Importance:
    """The scores that follow from a model's statistics, which must have `absolute` and `square`."""
    found = [_of_layer(calibration, place, repeat) for place, repeat in places(cfg)]
    layers_L = np.array([1 - layer['cosine'] for layer in found])
    if not_sliced(cfg) is not None:
        return Importance(layers_L)
    squares = np.stack([layer['attn']['out']['input']['square'] for layer in found])
    read_by = (('attn', 'q'), ('mlp', 'up'))
    return Importance(
        layers_L,
        np.stack([layer['mlp']['down']['input']['absolute'] for layer in found]),
        np.sqrt(squares.reshape(cfg.num_layers, cfg.num_heads, cfg.head_dim).sum(axis=-1)),
        np.stack([sum(layer[part][name]['input']['absolute'] for part, name in read_by) for layer in found]),
        np.stack([*(layer['entering'] for layer in found), calibration.leaving / calibration.tokens]),
    )


def _of_layer(calibration: Calibration, place: tuple[int, int], repeat: int) -> Any:
    """The means over tokens of one layer."""
    return _mean(calibration.layers[place[0]][place[1]], repeat, calibration.tokens)


def _mean(tree: Any, repeat: int, count: float) -> Any:
    if isinstance(tree, dict):
        return {name: _mean(part, repeat, count) for name, part in tree.items()}
    return tree[repeat] / count


def most(scores: np.ndarray, count: int) -> Ids:
    """The numbers of the `count` highest scores, ascending; of equal ones the first."""
    return tuple(sorted(np.argsort(-scores, kind='stable')[:count].tolist()))


def most_heads(scores_N: np.ndarray, groups: int, heads: int, kept_groups: int) -> tuple[Ids, Ids]:
    """(query heads, kv heads) that stay in one layer.

    First the kv heads that matter most, each with all of its query heads; then in each of these equally many query
    heads, again those that matter most. With as many heads per group as before whole groups go, with as many groups as
    before each of them shrinks: which of the two a smaller cache or a smaller product asks for, the sizes say.
    """
    by_group = scores_N.reshape(groups, -1)
    kept = most(np.sqrt(np.square(by_group).sum(axis=-1)), kept_groups)
    per_group = by_group.shape[1]
    return (
        tuple(group * per_group + head for group in kept for head in most(by_group[group], heads // kept_groups)),
        kept,
    )


def of_layers(scores: Importance, layers: Sequence[int]) -> Importance:
    """The scores of some of the layers."""
    rows = list(layers)
    mlp_LF, heads_LN, width_LD = (
        None if part is None else part[rows] for part in (scores.mlp_LF, scores.heads_LN, scores.width_LD)
    )
    streams_LD = None if scores.streams_LD is None else scores.streams_LD[[*rows, -1]]
    return Importance(scores.layers_L[rows], mlp_LF, heads_LN, width_LD, streams_LD)
