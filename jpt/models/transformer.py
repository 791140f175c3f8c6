"""The one transformer: init, forward, unembed, and the pieces of forward that pipeline stages are made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.kernels.staged_scan import staged_scan
from jpt.kernels.vocab import embed_lookup
from jpt.models.attention import Where
from jpt.models.block import Block, apply_block
from jpt.models.cache import CACHE_SCALES, Cache, LayerCache, admit
from jpt.models.config import Compute, ModelConfig, Segment
from jpt.models.encoder import init_encoder, masked_words, normed_embeddings
from jpt.models.layers import along_last, norm
from jpt.models.mtp import init_mtp
from jpt.models.rope import rope_table
from jpt.models.routing import RouterSums, add_layer, no_sums
from jpt.models.taps import EMBEDDED, NORMED, Passed, Slots, check_taps, empty_slots, filled, layer_taps
from jpt.quant.dot import dot

Params = dict[str, Any]
# Parameters that are held in float32 whatever the others are: steps of a correction are lost in fewer bits, and a scale
# of a cache that is rounded rounds all that is kept.
KEPT = ('correction', *CACHE_SCALES)


class Forward(NamedTuple):
    """What a pass over the layers returns; `taps` holds the hidden states that were asked for, by name, [B, T, D]."""

    hidden_BTD: jax.Array  # of `forward`: after the final norm
    cache: Cache | None
    taps: Slots
    router: RouterSums | None  # of all layers; None for a model without experts


def init(cfg: ModelConfig, key: jax.Array, dtype: DTypeLike = 'float32') -> Params:
    """Random parameters: plain dicts, layers as `params['layers'][segment][kind]` stacked on the segment's repeats."""
    keys = iter(jax.random.split(key, 3 + len(cfg.segments)))

    def table(rows: int, std: float) -> jax.Array:
        return std * jax.random.normal(next(keys), (rows, cfg.width), jnp.float32)

    std = cfg.width**-0.5
    params: Params = {'embed': {'embedding': table(cfg.vocab_size, std)}}
    if cfg.learned_positions:
        params['positions'] = {'embedding': table(cfg.max_length, 0.1 * std)}
    params['layers'] = [_init_segment(cfg, segment, next(keys)) for segment in cfg.segments]
    if not cfg.residual_norms:
        params['final_norm'] = norm_params(cfg)
    if cfg.encoder is not None:
        params |= init_encoder(cfg, jax.random.fold_in(key, 1))
    if cfg.mtp:
        params['mtp'] = init_mtp(cfg, jax.random.fold_in(key, 2), _one_token(cfg))
    if not cfg.tied:
        params['lm_head'] = {'kernel': table(cfg.vocab_size, std)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if last_name(path) in KEPT else leaf.astype(dtype), params
    )


def last_name(path: tuple[Any, ...]) -> Any:
    """The name of a leaf in its module, from its path in a tree; None where the path ends otherwise."""
    return getattr(path[-1], 'key', None)


def norm_params(cfg: ModelConfig) -> Params:
    """Fresh parameters of one norm."""
    module = norm(cfg, 'norm').clone(parent=None, name=None)
    return module.init(jax.random.key(0), jnp.zeros((1, cfg.width)))['params']


def _init_segment(cfg: ModelConfig, segment: Segment, key: jax.Array) -> list[Params]:
    hidden = jnp.zeros((1, 1, cfg.width))
    where = _one_token(cfg)

    def stack(index: int) -> Params:
        block = Block(cfg, segment.kinds[index], Compute(attention='dense'), parent=None)
        keys = jax.random.split(jax.random.fold_in(key, index), segment.repeats)
        return jax.vmap(lambda k: block.init(k, hidden, where)['params'])(keys)

    return [stack(index) for index in range(len(segment.kinds))]


def _one_token(cfg: ModelConfig) -> Where:
    return locate(cfg, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), 'float32')


def locate(cfg: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array, dtype: DTypeLike) -> Where:
    """Positions, segments and rotary angles, computed once for all layers."""
    tables = tuple(rope_table(rope, cfg.rotary_dim, positions_BT, segments_BT, dtype) for rope in cfg.ropes())
    # Without the barrier XLA computes sines and cosines anew inside every layer that is not in a loop.
    return Where(positions_BT, segments_BT, jax.lax.optimization_barrier(tables))


def embed(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    compute: Compute,
    token_types_BT: jax.Array | None = None,
) -> jax.Array:
    """The hidden states that enter the first layer, [B, T, D] in the compute dtype."""
    hidden_BTD = embed_lookup(params['embed']['embedding'], tokens_BT).astype(compute.dtype)
    if cfg.embed_scale is not None:
        # Rounded to the compute dtype as the checkpoints of such families were trained.
        hidden_BTD = hidden_BTD * jnp.asarray(cfg.embed_scale, compute.dtype)
    if cfg.learned_positions:
        hidden_BTD = hidden_BTD + jnp.take(params['positions']['embedding'], positions_BT, axis=0).astype(compute.dtype)
    if cfg.encoder is not None:
        hidden_BTD = normed_embeddings(cfg, params, hidden_BTD, token_types_BT)
    return compute.place(hidden_BTD, ('batch', 'length', None))


class _Run(NamedTuple):
    """What a run of layers carries from layer to layer."""

    hidden_BTD: jax.Array
    entries: list[Any]  # of the cache
    taps: Slots
    router: RouterSums | None


def run_layers(
    cfg: ModelConfig,
    layers: Sequence[Sequence[Params]],
    hidden_BTD: jax.Array,
    where: Where,
    compute: Compute,
    cache: Cache | None = None,
    taps: Sequence[str] = (),
) -> Forward:
    """All layers of the model, segment by segment; each segment is one scan over its repeats. Without the
    final norm."""
    found: Slots = {}
    entries = []
    router = no_sums(cfg, hidden_BTD.dtype)
    for index, segment in enumerate(cfg.segments):
        first = cfg.layer_index(index, 0, 0)
        run = _Run(
            hidden_BTD,
            cache.layers[index] if cache else [],
            empty_slots(layer_taps(taps, first, first + segment.num_layers), hidden_BTD),
            router,
        )
        run = _run_segment(cfg, index, segment, layers[index], run, where, compute, cache)
        hidden_BTD, router = run.hidden_BTD, run.router
        found.update(run.taps)
        entries.append(run.entries)
    if cache is not None:
        cache = cache._replace(layers=entries, next_slot=cache.next_slot + hidden_BTD.shape[1])
    return Forward(hidden_BTD, cache, found, router)


def _run_segment(
    cfg: ModelConfig,
    index: int,
    segment: Segment,
    layers: Sequence[Params],
    run: _Run,
    where: Where,
    compute: Compute,
    cache: Cache | None,
) -> _Run:
    blocks = [apply_block(cfg, kind, compute) for kind in segment.kinds]

    def period(run: _Run, step: tuple[list[Params], jax.Array | None]) -> tuple[_Run, None]:
        """The layers of one period, one after the other."""
        params, repeat = step
        hidden, entries, taps, router = run.hidden_BTD, list(run.entries), run.taps, run.router
        for kind, block in enumerate(blocks):
            layer_cache = None
            if cache is not None:
                layer_cache = LayerCache(entries[kind], repeat, cache.next_slot, cache.positions_BS, cache.segments_BS)
            layer = cfg.layer_index(index, kind, 0) + (0 if repeat is None else repeat) * len(blocks)
            after = block(params[kind], hidden, where, layer_cache)
            router = add_layer(router, layer, after.router)
            if after.cache is not None:
                entries[kind] = after.cache.entry
            taps = filled(taps, layer, Passed(hidden, after.hidden_BTD, after.mixed_BTD))
            hidden = after.hidden_BTD
        return _Run(hidden, entries, taps, router), None

    if segment.repeats == 1:  # no loop, and no slices out of a stack of one
        return period(run, (jax.tree.map(lambda leaf: leaf[0], list(layers)), None))[0]
    steps = (list(layers), jnp.arange(segment.repeats, dtype=jnp.int32))
    scan = jax.lax.scan if cache is not None else staged_scan  # a cache is of all layers
    return scan(period, run, steps, unroll=min(compute.unroll, segment.repeats))[0]


def final_norm(cfg: ModelConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """The hidden states that the unembedding reads."""
    if cfg.residual_norms:
        return hidden_BTD
    apply: Callable[..., Any] = norm(cfg, 'norm').clone(parent=None, name=None).apply
    return apply({'params': params['final_norm']}, hidden_BTD)


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    cache: Cache | None = None,
    taps: Sequence[str] = (),
    *,
    token_types_BT: jax.Array | None = None,
    compute: Compute = Compute(),  # noqa: B008 (frozen)
) -> Forward:
    """Hidden states of a batch of tokens [B, T], after the final norm.

    Positions default to 0..T-1 (plus what the cache holds) and segments to one text per row. With a cache the new
    tokens are written to its next slots and attend to all of it. Token types (of encoders) default to 0. Taps name
    hidden states to return, see models/taps.py.
    """
    check_taps(cfg, taps)
    if positions_BT is None:
        first = cache.next_slot if cache is not None else 0
        positions_BT = jnp.broadcast_to(first + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    if cache is not None:
        cache = admit(cache, positions_BT, segment_ids_BT)
    where = locate(cfg, positions_BT, segment_ids_BT, compute.dtype)
    embedded_BTD = embed(cfg, params, tokens_BT, positions_BT, compute, token_types_BT)
    result = run_layers(cfg, params['layers'], embedded_BTD, where, compute, cache, taps)
    hidden_BTD = final_norm(cfg, params, result.hidden_BTD)
    ends = {EMBEDDED: embedded_BTD, NORMED: hidden_BTD}
    found = result.taps | {name: ends[name] for name in taps if name in ends}
    return result._replace(hidden_BTD=hidden_BTD, taps=found)


def head_kernel(cfg: ModelConfig, params: Params) -> jax.Array:
    """The unembedding matrix [V, D]: the embedding table itself where the model ties them."""
    return params['embed']['embedding'] if cfg.tied else params['lm_head']['kernel']


def unembed(cfg: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], in at least float32; columns beyond the vocabulary are -inf."""
    kernel = head_kernel(cfg, params)
    if cfg.encoder is not None:
        hidden = masked_words(cfg, params, hidden)
    logits = dot(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)), kernel)
    if cfg.encoder is not None:
        logits = logits + along_last(params['mlm']['output']['bias'].astype(logits.dtype), logits)
    if cfg.logit_soft_cap is not None:
        logits = cfg.logit_soft_cap * jnp.tanh(logits / cfg.logit_soft_cap)
    rows = kernel.shape[0]
    if rows > cfg.vocab_size:
        beyond = jnp.arange(rows).reshape((1,) * (logits.ndim - 1) + (rows,)) >= cfg.vocab_size
        logits = jnp.where(beyond, -jnp.inf, logits)
    return logits
