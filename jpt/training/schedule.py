"""Learning rate over the updates of a run: warm-up, then constant, linear, cosine or warm-up-stable-decay."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jpt.config import require

Schedule = Callable[[jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate of a run."""

    kind: Literal['constant', 'linear', 'cosine', 'wsd'] = 'cosine'
    lr: float = 1e-3  # the highest
    min_lr: float = 0.0  # where linear, cosine and wsd end
    warmup: int = 0  # updates that rise linearly from 0
    decay_steps: int | None = None  # wsd: updates of the final decay; None: a tenth of the run
    decay: Literal['linear', 'cosine', 'minus_sqrt'] = 'linear'  # wsd: the form of the decay

    def __post_init__(self) -> None:
        require(self, 'lr', self.lr > 0, 'a positive number')
        require(self, 'min_lr', 0 <= self.min_lr <= self.lr, f'a number from 0 to lr={self.lr}')
        require(self, 'warmup', self.warmup >= 0, 'an integer of 0 or more')
        require(self, 'decay_steps', self.decay_steps is None or self.decay_steps > 0, 'a positive integer or None')
        if self.kind == 'constant':
            require(self, 'min_lr', self.min_lr == 0, "0 when kind='constant', which never decays")
        if self.kind != 'wsd':
            require(self, 'decay_steps', self.decay_steps is None, f"None when kind={self.kind!r}: it is for 'wsd'")


def make_schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The learning rate as a function of the number of updates already made, for a run of `steps` updates.

    Update number n (from 0) has lr (n + 1) / (warmup + 1) while n < warmup, lr at n = warmup, and with
    r = (n - warmup) / (steps - warmup) for 'linear' min_lr + (lr - min_lr) (1 - r), for 'cosine' min_lr +
    (lr - min_lr) (1 + cos(pi r)) / 2. 'wsd' stays at lr and does the same, or 1 - sqrt(r), over the last `decay_steps`.

    Raises:
        ValueError: warm-up and decay do not fit into the run.
    """
    if config.warmup >= steps:
        raise ValueError(f'schedule.warmup={config.warmup}: expected less than steps={steps}')
    first, after = config.warmup, steps - config.warmup
    warmup = optax.linear_schedule(config.lr / (first + 1), config.lr, max(first, 1))
    if config.kind == 'wsd':
        decay = max(steps // 10, 1) if config.decay_steps is None else config.decay_steps
        if decay > after:
            raise ValueError(f'schedule.decay_steps={decay}: expected at most steps - warmup = {after}')
        pieces = [warmup, optax.constant_schedule(config.lr), _decay(config, config.decay, decay)]
        return optax.join_schedules(pieces, [first, steps - decay])
    if config.kind == 'constant':
        return optax.join_schedules([warmup, optax.constant_schedule(config.lr)], [first])
    return optax.join_schedules([warmup, _decay(config, config.kind, after)], [first])


def _decay(config: ScheduleConfig, form: str, steps: int) -> Schedule:
    match form:
        case 'linear':
            return optax.linear_schedule(config.lr, config.min_lr, steps)
        case 'cosine':
            return optax.cosine_decay_schedule(config.lr, steps, alpha=config.min_lr / config.lr)
        case _:
            return lambda n: config.min_lr + (config.lr - config.min_lr) * (1 - jnp.sqrt(jnp.clip(n / steps, 0, 1)))
