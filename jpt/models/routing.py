"""Which experts a token goes to, with what weight, and how evenly the tokens of a text are spread over them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.kernels.local import psum
from jpt.kernels.parallel_attention import ROWS, SEQUENCE
from jpt.models.config import Experts, ModelConfig


class Choice(NamedTuple):
    """The experts of M tokens: ids [M, J] int32, weights [M, J], and the scores [M, E] that they come from."""

    ids_MJ: jax.Array
    weights_MJ: jax.Array
    scores_ME: jax.Array


class RouterSums(NamedTuple):
    """What the router of one layer adds to the auxiliary losses and to the metrics, as sums over real tokens.

    balance: see `balance`. z: logsumexp(logits)^2 (Zoph et al. 2022, ST-MoE, equation 5). load_E: how many tokens went
    to each expert, [L, E] of a whole model. late: rows that needed a further round of exchange, see
    kernels/expert_parallel.py. dropped: rows beyond an expert's capacity.
    """

    balance: jax.Array
    z: jax.Array
    load_E: jax.Array
    late: jax.Array
    dropped: jax.Array


def no_sums(cfg: ModelConfig, dtype: DTypeLike = 'float32') -> RouterSums | None:
    """The sums before the first layer, load [L, E]; None for a model without experts."""
    if cfg.experts is None:
        return None
    wide = jnp.promote_types(dtype, jnp.float32)
    scalar = jnp.zeros((), wide)
    return RouterSums(scalar, scalar, jnp.zeros((cfg.num_layers, cfg.experts.count), wide), scalar, scalar)


def add_layer(total: RouterSums | None, layer: jax.Array | int, sums: RouterSums | None) -> RouterSums | None:
    """The sums of all layers so far, with those of one more; `layer` is its number in the model."""
    if total is None or sums is None:
        return total
    return RouterSums(
        total.balance + sums.balance,
        total.z + sums.z,
        total.load_E.at[layer].add(sums.load_E),
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


def router_sums(experts: Experts, logits_ME: jax.Array, choice: Choice, segments_BT: jax.Array) -> RouterSums:
    """The sums of one layer over the real tokens of a batch [B, T], M = B * T; none late and none dropped."""
    real_M = segments_BT.reshape(-1) > 0
    load_E = jnp.sum(_chosen(choice, real_M), axis=0)
    z = jnp.sum(jnp.where(real_M, jnp.square(jax.nn.logsumexp(logits_ME, axis=-1)), 0))
    even = balance(choice, segments_BT) if experts.balance_over == 'text' else batch_balance(choice, segments_BT)
    return RouterSums(even, z, load_E, jnp.zeros_like(z), jnp.zeros_like(z))


def _chosen(choice: Choice, real_M: jax.Array) -> jax.Array:
    """1 where a real token goes to an expert, [M, E]."""
    experts = choice.scores_ME.shape[-1]
    dtype = choice.scores_ME.dtype
    return jax.nn.one_hot(choice.ids_MJ, experts, dtype=dtype).sum(axis=1) * real_M[:, None].astype(dtype)


def balance(choice: Choice, segments_BT: jax.Array) -> jax.Array:
    """The balance loss of every text, times its tokens, summed: sum over texts of n * sum_e f_e P_e.

    f_e = E / (J n) * (tokens of the text that go to expert e), P_e = the mean of its score, scores divided by their sum
    (DeepSeek-V3, equations 17 to 20). 1 per token where experts are used evenly. A text is what has one segment id in
    a row, so neither packing, microbatches nor devices change the sum; over `context` the parts of a text are put
    together. Only P has a gradient.
    """
    batch, length = segments_BT.shape
    experts, per_token = choice.scores_ME.shape[-1], choice.ids_MJ.shape[-1]
    shares = _shares(choice)
    used = _chosen(choice, segments_BT.reshape(-1) > 0).reshape(batch, length, experts)
    # Texts are numbered from 1 in a row, so there are no more of them than tokens in the whole row.
    texts = segments_BT.shape[1] * psum(1, ['context']) + 1

    def per_text(values_TX: jax.Array, segments_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_TX, segments_T, texts)

    count = psum(jax.vmap(per_text)(used, segments_BT), ['context'])
    tokens = jnp.sum(count, axis=-1, keepdims=True) / per_token
    share_of_text = count / jnp.where(tokens > 0, tokens, 1)
    mine = jnp.take_along_axis(share_of_text, segments_BT[..., None], axis=1, mode='clip')
    terms = jax.lax.stop_gradient(mine) * shares.reshape(mine.shape)
    return experts / per_token * jnp.sum(jnp.where(segments_BT[..., None] > 0, terms, 0))


def batch_balance(choice: Choice, segments_BT: jax.Array) -> jax.Array:
    """As `balance`, with f_e taken over all tokens that are computed together: a microbatch on all devices.

    Exempt from the rule that a loss does not depend on how a batch is divided: f_e is that of the microbatch.
    """
    real_M = segments_BT.reshape(-1) > 0
    experts, per_token = choice.scores_ME.shape[-1], choice.ids_MJ.shape[-1]
    used, tokens = psum((jnp.sum(_chosen(choice, real_M), axis=0), jnp.sum(real_M)), (*ROWS, SEQUENCE))
    share_E = jax.lax.stop_gradient(used / jnp.maximum(tokens, 1))
    return experts / per_token * jnp.sum(jnp.where(real_M[:, None], share_E[None] * _shares(choice), 0))


def _shares(choice: Choice) -> jax.Array:
    """Scores that sum to 1 over the experts, [M, E]."""
    total = jnp.sum(choice.scores_ME, axis=-1, keepdims=True)
    return choice.scores_ME / jnp.where(total > 0, total, 1)
