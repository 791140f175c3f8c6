"""The two compiled programs of generation: reading the prompts, and drawing one token after another.

Both take everything that differs between requests as arrays, so the number of compiled programs is that of the shapes
(see `bucket`) and of the few static choices in `Program`.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.generation.layout import decoding_cache, one_by_one
from jpt.generation.placement import everywhere, place_cache, place_rows
from jpt.generation.sampling import Logps, Sampling, draw
from jpt.models.cache import Cache, init_cache
from jpt.models.config import Compute, ModelConfig
from jpt.models.transformer import Params, forward, head_kernel, unembed


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program is compiled for."""

    cfg: ModelConfig
    compute: Compute
    with_logps: bool = False
    with_penalty: bool = False  # whether any row has a repetition penalty
    own_layout: bool = False  # whether `decode` gets the parameters that layout.decoding_params makes


class Request(NamedTuple):
    """Settings of the draws, most new tokens of each row (int32 [B]), ids that end a text (int32 [E])."""

    sampling: Sampling
    budget_B: jax.Array
    eos_E: jax.Array


class Rows(NamedTuple):
    """What decoding carries from token to token. The newest token is not in the cache yet."""

    cache: Cache
    tokens_B: jax.Array  # int32
    positions_B: jax.Array  # int32, of the newest token
    counts_B: jax.Array  # int32, tokens drawn so far
    active_B: jax.Array  # bool: the row goes on
    seen_BV: jax.Array | None  # bool: the tokens of prompt and output so far


class Drawn(NamedTuple):
    """Tokens drawn, int32 [B, C], -1 after the end of a row; logps float32 [B, C] each, where asked for."""

    tokens_BC: jax.Array
    logps_BC: Logps | None


def bucket(size: int, least: int = 16) -> int:
    """The next of `least` * (1, 1.5, 2, 3, 4, 6, 8, ...): at most half as much again, few different ones."""
    whole = least
    while whole < size:
        if whole + whole // 2 >= size:
            return whole + whole // 2
        whole *= 2
    return whole


@partial(jax.jit, static_argnames=('program', 'slots'))
def prefill(
    program: Program, slots: int, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, request: Request
) -> tuple[Rows, Drawn]:
    """Reads right-padded prompts of `lengths_B` tokens into a cache of `slots` and draws the first token of each row.

    Rows of budget 0 (there to fill the batch) draw none.
    """
    cfg = program.cfg
    batch, length = tokens_BT.shape
    places_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    real_BT = places_BT < lengths_B[:, None]
    # Padding may lie beyond the last position the model knows; it has segment 0, so any position will do.
    positions_BT = jnp.where(real_BT, places_BT, 0)
    tokens_BT = place_rows(tokens_BT)
    cache = place_cache(cfg, init_cache(cfg, batch, slots, program.compute.dtype))
    result = forward(cfg, params, tokens_BT, positions_BT, real_BT.astype(jnp.int32), cache, compute=program.compute)
    assert result.cache is not None
    seen_BV = None
    if program.with_penalty:
        rows = head_kernel(cfg, params).shape[0]  # of a padded vocabulary too
        seen_BV = jnp.zeros((batch, rows), bool).at[jnp.arange(batch)[:, None], tokens_BT].max(real_BT)
    last_BD = jnp.take_along_axis(result.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    none_B = jnp.zeros_like(lengths_B)
    cache = decoding_cache(cfg, result.cache) if program.own_layout else result.cache
    before = Rows(cache, none_B, lengths_B - 1, none_B, request.budget_B > 0, seen_BV)
    after, tokens_B, logps = _next(program, params, request, before, last_BD)
    return after, everywhere(jax.tree.map(lambda leaf: leaf[:, None], Drawn(tokens_B, logps)))


@partial(jax.jit, static_argnames=('program', 'width'), donate_argnames='rows')
def decode(
    program: Program,
    width: int,
    params: Params,
    request: Request,
    rows: Rows,
    going_B: jax.Array,
    steps: jax.Array,
) -> tuple[Rows, Drawn]:
    """Draws up to `steps` <= `width` tokens more in every row that goes on, and stops early when none does.

    going_B: bool, False ends a row (it met a stop string). The cache must have that many slots left.
    """
    if program.own_layout:
        program = dataclasses.replace(program, cfg=one_by_one(program.cfg))
    batch = rows.tokens_B.shape[0]
    logp_BC = jnp.zeros((batch, width), jnp.float32)
    nothing = Drawn(jnp.full((batch, width), -1, jnp.int32), Logps(logp_BC, logp_BC) if program.with_logps else None)
    rows = rows._replace(active_B=rows.active_B & going_B)

    def more(state: tuple[jax.Array, Rows, Drawn]) -> jax.Array:
        done, rows, _ = state
        return (done < steps) & jnp.any(rows.active_B)

    def step(state: tuple[jax.Array, Rows, Drawn]) -> tuple[jax.Array, Rows, Drawn]:
        """The token drawn last goes through the model, and the next one is drawn."""
        done, rows, drawn = state
        result = forward(
            program.cfg,
            params,
            rows.tokens_B[:, None],
            rows.positions_B[:, None],
            rows.active_B[:, None].astype(jnp.int32),
            rows.cache,
            compute=program.compute,
        )
        assert result.cache is not None
        rows = rows._replace(cache=result.cache)
        rows, tokens_B, logps = _next(program, params, request, rows, result.hidden_BTD[:, 0])
        place: Any = partial(jax.lax.dynamic_update_index_in_dim, index=done, axis=1)
        return done + 1, rows, jax.tree.map(place, drawn, Drawn(tokens_B, logps))

    _, rows, drawn = jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), rows, nothing))
    return rows, everywhere(drawn)


def _next(
    program: Program, params: Params, request: Request, rows: Rows, hidden_BD: jax.Array
) -> tuple[Rows, jax.Array, Logps | None]:
    """Draws a token from the hidden state of each row's newest token; -1 in rows that have ended."""
    logits_BV = unembed(program.cfg, params, hidden_BD).astype(jnp.float32)  # of float64 too: draws are float32
    tokens_B, logps = draw(logits_BV, rows.seen_BV, request.sampling, rows.counts_B, program.with_logps)
    seen_BV = rows.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(seen_BV.shape[0]), tokens_B].set(True)
    counts_B = rows.counts_B + rows.active_B
    ended_B = jnp.any(tokens_B[:, None] == request.eos_E[None], axis=1) | (counts_B >= request.budget_B)
    after = Rows(rows.cache, tokens_B, rows.positions_B + rows.active_B, counts_B, rows.active_B & ~ended_B, seen_BV)
    return after, jnp.where(rows.active_B, tokens_B, -1), logps
