"""Pairs of hidden states, one of the student and one of the teacher, and what each adds to a distillation's loss.

Of a pair with distance d, weight w and projection P (the identity where the widths are equal) a token adds

    w * d(P h_student, stop_gradient(h_teacher))

to the loss, in the mean over tokens that the other terms have. Hidden states are named as in models/taps.py.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.config import require
from jpt.distill.losses import Pair as Summed
from jpt.distill.losses import cosine_distance, mean_squared_error, smooth_l1
from jpt.models.config import ModelConfig
from jpt.models.layers import Linear
from jpt.models.names import BESIDE
from jpt.models.taps import check_taps
from jpt.quant.dot import dot

SINGLE = 'teacher'  # what a teacher is called where there is one
Distance = Callable[[jax.Array, jax.Array, jax.Array], Summed]


@dataclasses.dataclass(frozen=True)
class HiddenPair:
    """A hidden state of the student that is to become one of the teacher's, see jpt.distill.pairs."""

    student: str  # the name of a hidden state, as 'layers.3.output': see jpt.models.taps
    teacher: str
    loss: Literal['cosine', 'mse', 'smooth_l1'] = 'cosine'
    weight: float = 1.0
    beta: float = 1.0  # smooth_l1: below this distance it is quadratic
    projection: bool = False  # a trained map from the student's width to the teacher's, where these differ
    of: str = SINGLE  # the teacher's name, where there are several

    def __post_init__(self) -> None:
        positive = self.weight > 0 and math.isfinite(self.weight)
        require(self, 'weight', positive, 'a positive number; leave the pair out to train without it')
        require(self, 'beta', self.beta > 0 and math.isfinite(self.beta), 'a positive number')
        require(self, 'beta', self.beta == 1 or self.loss == 'smooth_l1', "1, unless loss is 'smooth_l1'")

    @property
    def name(self) -> str:
        """What its metrics are called."""
        whose = '' if self.of == SINGLE else f'{self.of}.'
        return f'{self.loss}-{self.student}-{whose}{self.teacher}'

    @property
    def key(self) -> str:
        """What its projection is called among parameters, where checkpoints allow no dots."""
        return self.name.replace('.', '_')

    def distance(self) -> Distance:
        """The loss as a function of student, teacher and weights, see jpt.distill.losses."""
        match self.loss:
            case 'cosine':
                return cosine_distance
            case 'mse':
                return mean_squared_error
            case 'smooth_l1':
                return partial(smooth_l1, beta=self.beta)


def taps_of(pairs: Iterable[HiddenPair], model: str) -> list[str]:
    """The hidden states that pairs need of 'student' or of a teacher."""
    names = {pair.student if model == 'student' else pair.teacher for pair in pairs if model in ('student', pair.of)}
    return sorted(names)


def check_pairs(
    pairs: Iterable[HiddenPair],
    student: ModelConfig,
    teachers: Mapping[str, ModelConfig],
    place: str = 'config.distill.pairs',
) -> None:
    """Checks that these models have these pairs.

    Raises:
        ValueError: the name of no teacher or of no hidden state, a pair that is there twice, widths that differ without
            a projection, or a projection between equal widths.
    """
    seen: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        here = f'{place}[{index}]'
        if pair.of not in teachers:
            raise ValueError(f'{here}.of={pair.of!r}: expected a teacher: {", ".join(teachers)}')
        teacher = teachers[pair.of]
        check_taps(student, [pair.student], f'{here}.student')
        check_taps(teacher, [pair.teacher], f'{here}.teacher')
        if pair.name in seen:
            raise ValueError(
                f'{here}: {pair.loss} of {pair.student!r} and {pair.teacher!r} is {place}[{seen[pair.name]}] already: '
                'expected every pair once, its weight being free'
            )
        seen[pair.name] = index
        if pair.projection == (student.width == teacher.width):
            raise ValueError(
                f"{here}.projection={pair.projection}: expected {not pair.projection}, since the student's width is "
                f"{student.width} and the teacher's {teacher.width}"
            )


def new_projections(
    pairs: Iterable[HiddenPair],
    student: ModelConfig,
    teachers: Mapping[str, ModelConfig],
    key: jax.Array,
    dtype: DTypeLike,
) -> dict[str, Any]:
    """The parameters of the pairs' projections: {pair's key: {'to_teacher': {'kernel': [teacher's width, student's]}}}.

    Normal, of variance 1 / student's width, each from a key of its own, so that it does not depend on other pairs.
    """
    hidden_D = jnp.zeros(student.width)
    drawn = {}
    for pair in pairs:
        if pair.projection:
            own_key = jax.random.fold_in(key, zlib.crc32(pair.name.encode()))
            params = Linear(teachers[pair.of].width, parent=None).init(own_key, hidden_D)['params']
            drawn[pair.key] = {'to_teacher': jax.tree.map(lambda leaf: leaf.astype(dtype), params)}
    return drawn


def add_pairs(
    result: tuple[jax.Array, dict[str, Summed]],
    pairs: Iterable[HiddenPair],
    params: Mapping[str, Any],
    taps: Mapping[str, Mapping[str, jax.Array]],
    weights: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, Summed]]:
    """A loss with those of the pairs on top, and its metrics with each pair's, as sums and counts.

    Metrics are 'loss' with all of them and 'logits_loss' without; a pair's by its name, over the tokens of its teacher,
    and 'NAME-weighted', what it adds to the loss of all tokens.

    Args:
        result: the loss of the logits; its metrics have the weights of these tokens as their counts.
        params: of the student, with its projections.
        taps: hidden states [B, T, D] by name, of 'student' and of each teacher. What they hold where a weight is 0 does
            not matter.
        weights: [B, T] by teacher; 0 where a token is not taught by it.
    """
    total, sums = result
    loss, all_tokens = sums['loss']
    added: dict[str, Summed] = {}
    for pair in pairs:
        weights_BT = weights[pair.of]
        used_BT1 = (weights_BT != 0)[..., None]
        hidden_BTD = taps['student'][pair.student]
        if pair.projection:
            # Cleared before the product, which adds up over tokens in the gradient of its kernel.
            hidden_BTD = dot(jnp.where(used_BT1, hidden_BTD, 0), params[BESIDE][pair.key]['to_teacher']['kernel'])
        value, count = pair.distance()(hidden_BTD, taps[pair.of][pair.teacher], weights_BT)
        total = total + pair.weight * value
        added |= {pair.name: (value, count), f'{pair.name}-weighted': (pair.weight * value, all_tokens)}
    if not added:
        return result
    now = {'loss': (total, all_tokens), 'logits_loss': (loss, all_tokens)}
    return total, sums | jax.lax.stop_gradient(now | added)
