"""Attention whose sequence is cut over a manual mesh axis: keys and values travel, by a ring or gathered at once.

The two have the signatures of `blockwise_attention.forward` and `backward` and give the same numbers. The ring holds
one shard of keys and values at a time and hides the transfer behind the work (Liu, Zaharia, Abbeel, Ring Attention with
blockwise transformers, 2023); gathering is one collective, better where the sequence per device is short.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels import blockwise_attention as blockwise
from jpt.kernels.blockwise_attention import Scores, Tile
from jpt.kernels.masks import Places

CONTEXTS = ('ring', 'gather')


def _pass_on(tree, axis: str):
    """Every leaf to the next shard of the ring."""
    size = jax.sharding.get_abstract_mesh().shape[axis]
    return lax.ppermute(tree, axis, [(i, (i + 1) % size) for i in range(size)])


def _steps(axis: str):
    return jnp.arange(jax.sharding.get_abstract_mesh().shape[axis])


def ring_forward(q, k, v, places: Places, scores: Scores, tile: Tile, axis: str):
    """(out, lse) of local queries over the keys of every shard; arguments are local, keys travel around the ring."""

    def step(carry, _):
        (out, lse), keys = carry
        k, v, k_positions, k_segments = keys
        here = Places(places.q_positions, k_positions, places.q_segments, k_segments)
        part, part_lse = blockwise.forward(q, k, v, here, scores, tile)
        both = jnp.logaddexp(lse, part_lse)
        out = out * jnp.exp(lse - both)[..., None] + part * jnp.exp(part_lse - both)[..., None]
        return ((out, both), _pass_on(keys, axis)), None

    stats = jnp.promote_types(q.dtype, jnp.float32)
    nothing = jnp.zeros((*q.shape[:3], v.shape[3]), stats), jnp.full(q.shape[:3], blockwise.MASKED, stats)
    ((out, lse), _), _ = lax.scan(step, (nothing, (k, v, places.k_positions, places.k_segments)), _steps(axis))
    return out, lse


def ring_backward(q, k, v, places: Places, lse, delta, dout, scores: Scores, tile: Tile, axis: str):
    """(dq, dk, dv), local; the gradients of keys and values travel with them and are home after one full turn."""

    def step(carry, _):
        dq, keys, (dk, dv) = carry
        k, v, k_positions, k_segments = keys
        here = Places(places.q_positions, k_positions, places.q_segments, k_segments)
        more = blockwise.backward(q, k, v, here, lse, delta, dout, scores, tile)
        return (dq + more[0], *_pass_on((keys, (dk + more[1], dv + more[2])), axis)), None

    stats = jnp.promote_types(q.dtype, jnp.float32)
    start = (
        jnp.zeros(q.shape, stats),
        (k, v, places.k_positions, places.k_segments),
        (jnp.zeros(k.shape, stats), jnp.zeros(v.shape, stats)),
    )
    (dq, _, (dk, dv)), _ = lax.scan(step, start, _steps(axis))
    return dq, dk, dv


def _gathered(k, v, places: Places, axis: str):
    """Keys, values and places of every shard."""
    k, v, k_positions, k_segments = (
        lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v, places.k_positions, places.k_segments)
    )
    return k, v, Places(places.q_positions, k_positions, places.q_segments, k_segments)


def gather_forward(q, k, v, places: Places, scores: Scores, tile: Tile, axis: str):
    """(out, lse) of local queries over the keys of every shard, gathered."""
    k, v, places = _gathered(k, v, places, axis)
    return blockwise.forward(q, k, v, places, scores, tile)


def gather_backward(q, k, v, places: Places, lse, delta, dout, scores: Scores, tile: Tile, axis: str):
    """(dq, dk, dv), local: keys are gathered again (not kept), their gradients summed and scattered home."""
    k, v, places = _gathered(k, v, places, axis)
    dq, dk, dv = blockwise.backward(q, k, v, places, lse, delta, dout, scores, tile)
    home = (lax.psum_scatter(x, axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq, *home
