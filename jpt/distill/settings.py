"""What a distillation can be told: weights and terms of its loss, what is kept of a teacher, where that runs."""

import dataclasses
import math
from typing import Literal

from jpt.config import require
from jpt.distill.pairs import HiddenPair
from jpt.kernels.divergences import NAMES, SKEWED, Divergence
from jpt.sharding.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class MixtureSchedule:
    """How weights of a distillation change: from what they are until step `begin` to what they are from `end` on."""

    to: dict[str, float]  # the last weights, by the names of the first ones; others stay
    end: int  # steps
    begin: int = 0
    kind: Literal['linear', 'cosine'] = 'linear'

    def __post_init__(self) -> None:
        allowed = ('alpha', *NAMES)
        known = bool(self.to) and set(self.to) <= set(allowed)
        require(self, 'to', known, f'weights of some of {", ".join(allowed)}')
        in_range = all(value >= 0 for value in self.to.values()) and self.to.get('alpha', 0) <= 1
        require(self, 'to', in_range, 'numbers of 0 or more, and alpha from 0 to 1')
        require(self, 'begin', self.begin >= 0, 'an integer of 0 or more')
        require(self, 'end', self.end > self.begin, f'an integer above begin={self.begin}')


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How a student learns from a teacher with another tokenizer: from the words that both have, where both begin one.

    The teacher reads the same texts in tokens of its own, see jpt.data.alignment and jpt.kernels.aligned_loss.
    """

    length: int | None = None  # the teacher's tokens of a row; None: batch.length
    likely: int = 64  # words of each side that are looked at: the teacher's likeliest ones; all others are one more
    uld: float = 1.0  # weight of the sorted differences between words that only one side has

    def __post_init__(self) -> None:
        require(self, 'length', self.length is None or self.length > 0, 'a positive integer or None')
        require(self, 'likely', self.likely > 0, 'a positive integer')
        require(self, 'uld', 0 <= self.uld < math.inf, 'a finite number of 0 or more')


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How a student learns from its teacher: weights of divergences by name, see jpt.kernels.divergences, and pairs."""

    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    skew_kl: float = 0.0
    skew_reverse_kl: float = 0.0
    total_variation: float = 0.0
    beta: float = 0.5  # jsd: weight of the teacher, in the mixture and outside
    jsd_normalized: bool = False  # jsd is divided by beta (1 - beta): at its ends it is the KL one way and the other
    skew: float = 0.1  # the skewed ones: weight of the first argument of the KL in the mixture
    temperature: float = 1.0  # of both sides
    temperature_squared: bool = True  # divergences times temperature^2, so that their gradients keep their size
    alpha: float = 1.0  # weight of all divergences together; the rest is cross-entropy
    schedule: MixtureSchedule | None = None  # of the weights above, alpha among them
    pairs: tuple[HiddenPair, ...] = ()  # of hidden states; their losses, by their weights, are added
    targets: str | None = None  # a directory of jpt.distill.record: the teacher itself is not run
    form: Literal['tail', 'truncated', 'renormalized'] = 'tail'  # of likely words: what becomes of those left out
    alignment: Alignment | None = None  # of a teacher whose tokenizer is another one; None refuses that
    more_context: bool = False  # targets: also those whose teacher saw more of a document to the left than a row shows

    def __post_init__(self) -> None:
        require(self, 'temperature', self.temperature > 0, 'a positive number')
        require(self, 'alpha', 0 <= self.alpha <= 1, 'a number from 0 to 1')
        for name in NAMES:
            require(self, name, getattr(self, name) >= 0, 'a number of 0 or more')
        some = any(weight or self._last(divergence.name) for weight, divergence in self.terms())
        allowed = f'a positive weight of one of {", ".join(NAMES)}, or pairs'
        needs = bool(self.alpha or self._last('alpha')) and not self.pairs
        require(self, 'forward_kl', some or not needs, allowed)
        inside = 0 < self.beta < 1 or (self.jsd_normalized and self.beta in (0, 1))
        require(self, 'beta', inside, 'a number between 0 and 1, or with jsd_normalized from 0 to 1')
        require(self, 'skew', 0 <= self.skew < 1, 'a number from 0 to below 1')
        require(self, 'more_context', not self.more_context or self.targets is not None, 'False where targets is None')
        for name, of in (('beta', ('jsd',)), ('jsd_normalized', ('jsd',)), ('skew', tuple(SKEWED))):
            used = any(getattr(self, each) or self._last(each) for each in of)
            plain = getattr(self, name) == getattr(type(self), name)
            require(self, name, used or plain, f'no setting of it without a weight of {" or ".join(of)}')
        for name in ('temperature', *NAMES):
            require(self, name, math.isfinite(getattr(self, name)), 'a finite number')
        online = self.alignment is None or self.targets is None
        require(self, 'alignment', online, "None where targets is given: those are of the student's tokens")
        alike = self.alignment is None or not self.pairs
        require(self, 'pairs', alike, "none where alignment is given: the teacher's positions are others")
        runs = self.targets is None or not self.pairs
        require(self, 'pairs', runs, 'none where targets is given: a teacher that is not run has no hidden states')
        if self.form == 'renormalized':
            _warn_of_renormalized()

    def terms(self) -> tuple[tuple[float, Divergence], ...]:
        """The divergences that have a weight at first or in the end, with the first, as `distillation` takes them.

        Where none has, the forward KL is there with weight 0, to be reported.
        """
        used = [name for name in NAMES if getattr(self, name) or self._last(name)] or NAMES[:1]
        return tuple(
            (getattr(self, name), Divergence(name, self.beta, self.skew, self.jsd_normalized)) for name in used
        )

    def _last(self, name: str) -> float:
        """The weight at the end of the schedule; 0 where that does not name it."""
        return 0.0 if self.schedule is None else self.schedule.to.get(name, 0.0)


def _warn_of_renormalized() -> None:
    from absl import logging  # takes a while to import, and few need it

    logging.warning(
        "config.distill.form='renormalized' compares shares of the recorded words only: a student may have any mass "
        "outside of them at no cost, and the gradient is not that of the whole distributions; form='tail' counts it"
    )


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """What is kept of a teacher's distribution at every position: recorded, or handed over from a mesh of its own."""

    likely: int = 64  # words, at most
    top_p: float | None = None  # the fewest words that hold this mass instead, if that is fewer
    at_least: int = 1  # words, whatever top_p says
    dtype: Literal['bfloat16', 'float16', 'float8_e4m3fn'] = 'float16'  # of recorded log-probabilities
    vocab_size: int | None = None  # only so many rows of the teacher's table take part, for a student with fewer

    def __post_init__(self) -> None:
        require(self, 'likely', 0 < self.likely < 2**16, 'an integer from 1 to 65,535')
        require(self, 'top_p', self.top_p is None or 0 < self.top_p < 1, 'a number between 0 and 1, or None')
        positive = self.vocab_size is None or self.vocab_size >= self.likely
        require(self, 'vocab_size', positive, f'at least likely={self.likely}, or None')
        require(self, 'at_least', 0 < self.at_least <= self.likely, f'an integer from 1 to likely={self.likely}')
        effect = self.at_least == 1 or self.top_p is not None
        require(self, 'at_least', effect, '1 where top_p is None: only top_p leaves words out')


@dataclasses.dataclass(frozen=True)
class TeacherMesh(MeshConfig):
    """A mesh of the teacher's own: a program beside that of the student, whose likely words enter with the batch.

    What it hands over of every position is said by config.record.
    """

    devices: int = 0  # the last so many are the teacher's, the others the student's; 0: both have all
    microbatches: int = 1  # the teacher reads a batch in so many parts

    def __post_init__(self) -> None:
        require(self, 'pipe', self.pipe == 1, '1: a teacher on a mesh of its own runs without a pipeline')
        require(self, 'devices', self.devices >= 0, 'a number of devices, or 0 for all')
        require(self, 'microbatches', self.microbatches > 0, 'a positive integer')
