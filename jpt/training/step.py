"""One optimizer step: loss and gradients on the mesh, the update, and a refusal of anything that is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.sharding.grads import loss_and_grads, loss_and_sums
from jpt.sharding.plan import Plan
from jpt.training.ema import update_ema
from jpt.training.objective import Objective, Sums
from jpt.training.optimizer import Optimizer
from jpt.training.router import split_load
from jpt.training.state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Sums]]


def make_step(
    objective: Objective,
    optimizer: Optimizer,
    plan: Plan,
    ema_decay: float | None = None,
    correct: Callable[[Any, jax.Array], Any] | None = None,
) -> Step:
    """The step as a pure function (state, batch) -> (state, metrics); jit it with the state donated.

    Metrics are (sum, count) pairs; 'accepted' is 0 where the loss or the gradient was not finite, and then the state
    comes back as it was. `correct` changes the updated parameters by the load of the experts, see jpt.training.router.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        """The state after one batch, or as it was where the batch is refused, and the metrics."""
        total, grads, sums = loss_and_grads(objective, state.params, state.frozen, batch, plan, state.step)
        params, opt_state, info = optimizer.update(grads, state.opt_state, state.params, jnp.isfinite(total))
        accepted = info['accepted']
        sums, load = split_load(sums)
        if correct is not None and load is not None:
            params = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), correct(params, load), params)
        ema = state.ema
        if ema_decay is not None:
            fresh = update_ema(ema, params, ema_decay, state.step)
            ema = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), fresh, ema)
        one = jnp.ones((), jnp.float32)
        metrics = sums | {name: (value.astype(jnp.float32), one) for name, value in info.items()}
        new = TrainState(state.step + accepted.astype(jnp.int32), params, state.frozen, opt_state, ema, state.key)
        return new, metrics

    return step


def make_eval_step(objective: Objective, plan: Plan) -> Callable[[TrainState, Batch], Sums]:
    """The metrics of a batch, without gradients."""

    def evaluate(state: TrainState, batch: Batch) -> Sums:
        return split_load(loss_and_sums(objective, state.params, state.frozen, batch, plan, state.step))[0]

    return evaluate
