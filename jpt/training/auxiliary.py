"""What is minimized beside an objective's own loss: even use of experts, small router logits, further tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.data.batch import Batch
from jpt.kernels.expert_balance import batch_balance, load_everywhere
from jpt.models.config import Compute, ModelConfig
from jpt.models.routing import RouterSums
from jpt.training.mtp import mtp_counts, mtp_losses
from jpt.training.settings import RouterConfig

Sums = dict[str, tuple[jax.Array, jax.Array]]
Counts = dict[str, jax.Array]


class After(NamedTuple):
    """What there is behind the layers of a model: its parameters, final hidden states [B, T, D], its routers' sums."""

    params: Any
    hidden_BTD: jax.Array
    router: RouterSums | None


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """The auxiliary losses of a model, by their weights."""

    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    mtp: float = 0.0  # the mean of the losses of modules that predict further tokens

    def counts(self, cfg: ModelConfig, batch: Batch) -> Counts:
        """The global counts that these losses need of the whole batch."""
        return mtp_counts(batch, len(cfg.mtp)) if self.mtp else {}

    def reads_load(self, cfg: ModelConfig) -> bool:
        """Whether these losses need to know how the whole batch goes to experts, see Objective."""
        return cfg.experts is not None and _over_batch(self.router)

    def added(
        self,
        result: tuple[jax.Array, Sums],
        cfg: ModelConfig,
        after: After,
        micro: Batch,
        counts: Counts,
        compute: Compute,
    ) -> tuple[jax.Array, Sums]:
        """An objective's loss, with metrics as sums over tokens, and these on top; see `mtp_losses`, `_with_router`."""
        total, sums = result
        router = after.router
        if self.mtp and cfg.mtp:
            further, metrics, router = mtp_losses(cfg, *after, micro, counts, compute)
            total, sums = total + self.mtp * further, sums | jax.lax.stop_gradient(metrics)
        return _with_router((total, sums), self.router, cfg, router, counts)


def _over_batch(settings: RouterConfig) -> bool:
    return settings.balance_over == 'batch' and settings.balance_loss > 0


def _with_router(
    result: tuple[jax.Array, Sums], settings: RouterConfig, cfg: ModelConfig, router: RouterSums | None, counts: Counts
) -> tuple[jax.Array, Sums]:
    """A loss with those of the model's routers on top; itself for a model without experts.

    total + balance_loss * (mean of the balance over tokens, summed over layers) + z_loss * (likewise). Metrics:
    'balance' and 'router_z' are means over tokens and layers, 'late' is the share of rows that needed a further round
    of exchange, 'dropped' that beyond the capacity of an expert, 'load' [L, E] says how many tokens went to each expert
    (the step makes a number of it).
    """
    if router is None or cfg.experts is None:
        return result
    total, sums = result
    balance = router.balance
    if _over_batch(settings):
        load = counts['load'] if 'load' in counts else load_everywhere(router.load)
        balance = batch_balance(load, router.share)
    for weight, value in ((settings.balance_loss, balance), (settings.z_loss, router.z)):
        if weight:
            total = total + weight * value / jnp.maximum(counts['real_tokens'], 1)
    rows = jnp.sum(router.load)  # a token chooses `per_token` times in a layer
    more = {
        'balance': (balance, rows / cfg.experts.per_token),
        'router_z': (router.z, rows / cfg.experts.per_token),
        'late': (router.late, rows),
        'dropped': (router.dropped, rows),
        'load': (router.load, jnp.ones((), total.dtype)),
    }
    return total, sums | jax.lax.stop_gradient(more)
