"""What a distillation minimizes by its config: the loss of a token, and weights that may change from step to step."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.distill.settings import DistillConfig
from jpt.kernels.distillation_loss import Teacher, distillation
from jpt.kernels.divergences import NAMES
from jpt.kernels.token_losses import TokenLoss
from jpt.training.objective import Mixture


def token_loss(config: DistillConfig, teachers: tuple[Teacher, ...], form: str | None = None) -> TokenLoss:
    """The loss of a token; `form` is for recorded words, see `distillation`."""
    return distillation(
        *config.terms(),
        alpha=config.alpha,
        temperature=config.temperature,
        squared=config.temperature_squared,
        teachers=teachers,
        form=form,
    )


def mixture(config: DistillConfig, step: jax.Array | int, dtype: DTypeLike = 'float32') -> jax.Array:
    """The weights [terms + 1] after so many updates: alpha * weight of every divergence of `terms()`, then 1 - alpha.

    With r from 0 at `schedule.begin` to 1 at `schedule.end`, a weight is first + (last - first) r, or with 'cosine'
    first + (last - first) (1 - cos(pi r)) / 2.
    """
    schedule = config.schedule
    last = schedule.to if schedule else {}
    share = jnp.zeros((), dtype)
    if schedule is not None:
        share = jnp.clip((jnp.asarray(step, dtype) - schedule.begin) / (schedule.end - schedule.begin), 0, 1)
        if schedule.kind == 'cosine':
            share = (1 - jnp.cos(jnp.pi * share)) / 2

    def now(name: str) -> jax.Array:
        first = getattr(config, name)
        return first + (last.get(name, first) - first) * share

    alpha = now('alpha')
    used = {divergence.name for _, divergence in config.terms()}
    return jnp.stack([*(alpha * now(name) for name in NAMES if name in used), 1 - alpha])


def changing(config: DistillConfig) -> Mixture | None:
    """`mixture` of a config whose weights follow a schedule; None where they stay."""
    return None if config.schedule is None else functools.partial(mixture, config)
