"""Which experts a token goes to, with what weight, and what a model reports of the choices of its routers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.kernels.expert_balance import text_balance
from jpt.models.config import Experts, ModelConfig


class Choice(NamedTuple):
    """The experts of M tokens: ids [M, J] int32, weights [M, J], and the scores [M, E] that they come from."""

    ids_MJ: jax.Array
    weights_MJ: jax.Array
    scores_ME: jax.Array


class RouterSums(NamedTuple):
    """What the routers of a model add to the auxiliary losses and to the metrics, as sums over real tokens.

    balance: see kernels/expert_balance.py, within each text.
    z: logsumexp(logits)^2 (Zoph et al. 2022, ST-MoE, equation 5).
    load: how many tokens went to each expert, [L, E] of a model, MTP modules behind the layers, and [E] of one layer.
    share: scores that sum to 1 over the experts of a token, likewise.
    late: rows that needed a further round of exchange, see kernels/expert_parallel.py.
    dropped: rows beyond an expert's capacity.
    """

    balance: jax.Array
    z: jax.Array
    load: jax.Array
    share: jax.Array
    late: jax.Array
    dropped: jax.Array


def no_sums(cfg: ModelConfig, dtype: DTypeLike = 'float32') -> RouterSums | None:
    """The sums of a whole model before its first layer; None for a model without experts."""
    if cfg.experts is None:
        return None
    wide = jnp.promote_types(dtype, jnp.float32)
    scalar = jnp.zeros((), wide)
    by_expert = jnp.zeros((cfg.num_layers + len(cfg.mtp), cfg.experts.count), wide)
    return RouterSums(scalar, scalar, by_expert, by_expert, scalar, scalar)


def add_layer(total: RouterSums | None, layer: jax.Array | int, sums: RouterSums | None) -> RouterSums | None:
    """The sums of all layers so far, with those of one more; `layer` is its number in the model."""
    if total is None or sums is None:
        return total
    return RouterSums(
        total.balance + sums.balance,
        total.z + sums.z,
        total.load.at[layer].add(sums.load),
        total.share.at[layer].add(sums.share),
        total.late + sums.late.astype(total.late.dtype),
        total.dropped + sums.dropped,
    )


def choose(experts: Experts, logits_ME: jax.Array, correction_E: jax.Array | None = None) -> Choice:
    """The experts of each token from the router's logits [M, E], which are at least float32; see config.Experts."""
    scores = jax.nn.softmax(logits_ME) if experts.scoring == 'softmax' else jax.nn.sigmoid(logits_ME)
    ranked = jax.lax.stop_gradient(scores)
    if correction_E is not None:
        ranked = ranked + jax.lax.stop_gradient(correction_E.astype(ranked.dtype))[None]
    if experts.groups > 1:
        ranked = jnp.where(_in_top_groups(experts, ranked), ranked, -jnp.inf)
    ids = jax.lax.top_k(ranked, experts.per_token)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if experts.normalized:
        # Scores of a sigmoid may all be 0 in float32.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + (1e-20 if experts.scoring == 'sigmoid' else 0))
    return Choice(ids, weights * experts.scale, scores)


def _in_top_groups(experts: Experts, ranked_ME: jax.Array) -> jax.Array:
    """Where an expert is in one of the groups whose two best sum highest, bool [M, E]."""
    size = experts.count // experts.groups
    grouped = ranked_ME.reshape(-1, experts.groups, size)
    best = jax.lax.top_k(grouped, min(2, size))[0].sum(axis=-1)
    kept = jax.lax.top_k(best, experts.top_groups)[1]
    chosen = jax.nn.one_hot(kept, experts.groups, dtype=jnp.bool_).any(axis=1)
    return jnp.repeat(chosen, size, axis=-1)


def within_capacity(experts: Experts, ids_MJ: jax.Array) -> jax.Array:
    """The ids with those beyond an expert's capacity replaced by `count`, which stands for no expert.

    An expert takes `capacity` times an even share of these M tokens, all first choices before any second one (GShard,
    Lepikhin et al. 2020, algorithm 1). What is dropped depends on which tokens are looked at together.
    """
    if experts.capacity is None:
        return ids_MJ
    room = math.ceil(experts.capacity * ids_MJ.size / experts.count)
    by_choice = ids_MJ.T.reshape(-1)
    hits = jax.nn.one_hot(by_choice, experts.count, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(hits, axis=0) - 1) * hits, axis=-1)
    return jnp.where(rank < room, by_choice, experts.count).reshape(ids_MJ.T.shape).T


def router_sums(logits_ME: jax.Array, choice: Choice, segments_BT: jax.Array) -> RouterSums:
    """The sums of one layer over the real tokens of a batch [B, T], M = B * T; none late and none dropped."""
    dtype, experts = logits_ME.dtype, logits_ME.shape[-1]
    real_M1 = segments_BT.reshape(-1, 1) > 0
    chosen_ME = jax.nn.one_hot(choice.ids_MJ, experts, dtype=dtype).sum(axis=1) * real_M1.astype(dtype)
    total = jnp.sum(choice.scores_ME, axis=-1, keepdims=True)
    shares_ME = jnp.where(real_M1, choice.scores_ME / jnp.where(total > 0, total, 1), 0)
    z = jnp.sum(jnp.where(real_M1[:, 0], jnp.square(jax.nn.logsumexp(logits_ME, axis=-1)), 0))
    by_text = (*segments_BT.shape, experts)
    return RouterSums(
        balance=text_balance(chosen_ME.reshape(by_text), shares_ME.reshape(by_text), segments_BT),
        z=z,
        load=jnp.sum(chosen_ME, axis=0),
        share=jnp.sum(shares_ME, axis=0),
        late=jnp.zeros_like(z),
        dropped=jnp.zeros_like(z),
    )
