"""Modules that predict further tokens (multi-token prediction, MTP): DeepSeek-V3, section 2.2.

Module k stands behind the model and behind module k - 1. Where the model predicts token t + 1, it predicts token
t + k + 1: from the hidden state before it at t, and from the embedding of token t + k. Embedding and head are the
model's own.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpt.models.attention import Where
from jpt.models.block import Block, remat_policy
from jpt.models.config import Compute, LayerKind, ModelConfig
from jpt.models.layers import Linear, norm
from jpt.models.routing import RouterSums

Params = dict[str, Any]


class MTP(nn.Module):
    """One module: [B, T, D] before it and embeddings [B, T, D] -> normed hidden states [B, T, D], router sums."""

    cfg: ModelConfig
    kind: LayerKind
    compute: Compute

    @nn.compact
    def __call__(
        self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, where: Where
    ) -> tuple[jax.Array, RouterSums | None]:
        cfg = self.cfg
        both = (norm(cfg, 'embed_norm')(embedded_BTD), norm(cfg, 'hidden_norm')(hidden_BTD))
        joined_BTD = Linear(cfg.width, name='join')(jnp.concatenate(both, axis=-1))
        plain = dataclasses.replace(cfg, kv_cache='as_computed')
        after = Block(plain, self.kind, self.compute, name='layer')(joined_BTD, where)
        return norm(cfg, 'norm')(after.hidden_BTD), after.router


def init_mtp(cfg: ModelConfig, key: jax.Array, where: Where) -> list[Params]:
    """The parameters of all modules, from the places of one token."""
    token = jnp.zeros((1, 1, cfg.width))

    def fresh(index: int, kind: LayerKind) -> Params:
        module = MTP(cfg, kind, Compute(attention='dense'), parent=None)
        return module.init(jax.random.fold_in(key, index), token, token, where)['params']

    return [fresh(index, kind) for index, kind in enumerate(cfg.mtp)]


def modules(cfg: ModelConfig, compute: Compute) -> Iterator[Callable[..., Any]]:
    """Every module as a function of (its params, hidden, embedded, where), under the rematerialization asked for."""
    for kind in cfg.mtp:
        module = MTP(cfg, kind, compute, parent=None)

        def apply(params: Params, *inputs: Any, module: MTP = module) -> Any:
            return module.apply({'params': params}, *inputs)

        yield apply if compute.remat == 'none' else jax.checkpoint(apply, policy=remat_policy(compute.remat))
