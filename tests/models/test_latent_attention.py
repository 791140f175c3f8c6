"""Latent attention: decoding on the latents against the expanded form and the full pass, alone and with adapters."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jpt.kernels.cached_attention import FEW_QUERIES
from jpt.models.cache import Latents, init_cache
from jpt.models.config import Compute, Latent, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init
from jpt.quant.lora import add_lora, merge_lora

ROPE = Rope(1e3, interleaved=True)
# Two layers in one stack (a scan) and one of another kind; every width another number.
CFG = ModelConfig(
    'deepseek_v3',
    61,
    18,
    3,
    3,
    9,
    (Segment((LayerKind(ROPE, None, 24),), 2), Segment((LayerKind(ROPE, 6, 24),), 1)),
    64,
    latent=Latent(rank=7, query_rank=11, nope_dim=5, rope_dim=4, value_dim=8),
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 17)).astype(np.int32)
LENGTHS = np.array([9, 6])


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def random_params(cfg, dtype='float32'):
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    random = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == 'scale' else 0.0
        return (centre + 0.3 * random.normal(size=leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def with_adapters(params):
    """Adapters on every map of the attention, none of them zero."""
    adapted = add_lora(params, jax.random.key(3), ('layers/**/attn/{q_up,kv_down,kv_up,out}',), rank=3, alpha=2.0)
    keys = iter(jax.random.split(jax.random.key(4), 100))

    def fill(path, leaf):
        is_b = getattr(path[-1], 'name', None) == 'b'
        return 0.3 * jax.random.normal(next(keys), leaf.shape, leaf.dtype) if is_b else leaf

    return jax.tree_util.tree_map_with_path(fill, adapted)


@functools.cache
def stepper(attention, dtype):
    """The pass over some tokens, with a cache or without: hidden states and the cache."""
    compute = Compute(dtype, attention=attention)

    @jax.jit
    def step(params, tokens, positions=None, segments=None, cache=None):
        result = forward(CFG, params, tokens, positions, segments, cache, compute=compute)
        return result.hidden_BTD, result.cache

    return step


def full(params, dtype):
    return np.asarray(stepper('dense', dtype)(params, TOKENS)[0], np.float64)


def decoded(params, attention, dtype):
    """Hidden states [2, 17, D] from a prompt of ragged rows and eight steps of one token: row 1 is three shorter."""
    step = stepper(attention, dtype)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    segments = (positions < LENGTHS[:, None]).astype(np.int32)
    found = np.full((2, 17, CFG.width), np.nan)
    hidden, cache = step(params, TOKENS[:, :9], positions, segments, init_cache(CFG, 2, 17, dtype))
    for row, length in enumerate(LENGTHS):
        found[row, :length] = np.asarray(hidden[row, :length], np.float64)
    for offset in range(8):
        at = LENGTHS + offset
        tokens, places = TOKENS[np.arange(2), at][:, None], at[:, None].astype(np.int32)
        hidden, cache = step(params, tokens, places, np.ones((2, 1), np.int32), cache)
        found[np.arange(2), at] = np.asarray(hidden[:, 0], np.float64)
    assert all(isinstance(entry, Latents) for segment in cache.layers for entry in segment)
    return found


def check(found, wanted, tolerance):
    """Row 1 stops three tokens before the end."""
    assert np.isfinite(found[0]).all()
    assert np.isfinite(found[1, :14]).all()
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(found[1, :14], wanted[1, :14], rtol=0, atol=tolerance)


def test_decoding_on_latents_equals_the_expanded_form_and_the_full_pass(double_precision):
    params = random_params(CFG, 'float64')
    wanted = full(params, 'float64')
    check(decoded(params, 'auto', 'float64'), wanted, 1e-11)
    check(decoded(params, 'dense', 'float64'), wanted, 1e-11)


def test_adapters_enter_the_absorbed_products_as_they_enter_the_others(double_precision):
    plain = random_params(CFG, 'float64')
    adapted = with_adapters(plain)
    merged = full(merge_lora(adapted), 'float64')
    assert np.abs(merged - full(plain, 'float64')).max() > 0.1
    found = decoded(adapted, 'auto', 'float64')
    check(found, merged, 1e-11)


def test_the_absorbed_form_makes_no_keys_of_the_whole_cache():
    """No array of all slots, heads and their widths is in the program of a step; there is one in the expanded form."""
    params, cache = random_params(CFG), init_cache(CFG, 2, 40, 'float32')

    def sizes(attention, length):
        tokens = np.zeros((2, length), np.int32)
        program = jax.make_jaxpr(
            lambda p, c: forward(CFG, p, tokens, None, None, c, compute=Compute(attention=attention)).hidden_BTD
        )(params, cache)
        return shapes(program.jaxpr)

    both = (2, 40, 3, 13)  # [B, S, N, nope + value]
    assert both not in sizes('auto', 1)
    assert both not in sizes('auto', FEW_QUERIES)
    assert both in sizes('auto', FEW_QUERIES + 1)
    assert both in sizes('dense', 1)


def shapes(jaxpr):
    found = {var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(inner, 'jaxpr', inner)
            found |= shapes(inner) if hasattr(inner, 'eqns') else set()
    return found


def test_bfloat16_stays_near():
    params = random_params(CFG)
    wanted = full(params, 'float32')[0]
    error = np.abs(decoded(params, 'auto', 'bfloat16')[0] - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.05


def by_hand(cfg, k, x, scale):
    """[T, D] -> [T, D], one head and one query after the other in float64 (DeepSeek-V2, section 2.1)."""
    latent, heads, length = cfg.latent, cfg.num_heads, len(x)
    n, r, v = latent.nope_dim, latent.rope_dim, latent.value_dim

    def rms(x, weight):
        return x / np.sqrt(np.mean(x * x) + latent.norm_eps) * weight

    def turned(x, position):
        """Pairs of neighbours as complex numbers."""
        angles = position * 1e3 ** (-np.arange(0, r, 2) / r)
        pairs = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag])

    out = np.zeros((length, heads, v))
    queries, keys, values = [], [], []
    for t in range(length):
        q = (k['q_up']['kernel'] @ rms(k['q_down']['kernel'] @ x[t], k['q_norm']['scale'])).reshape(heads, n + r)
        down = k['kv_down']['kernel'] @ x[t]
        both = (k['kv_up']['kernel'] @ rms(down[: latent.rank], k['kv_norm']['scale'])).reshape(heads, n + v)
        shared = turned(down[latent.rank :], t)
        queries.append([np.concatenate([head[:n], turned(head[n:], t)]) for head in q])
        keys.append([np.concatenate([head[:n], shared]) for head in both])
        values.append(both[:, n:])
    for t in range(length):
        for h in range(heads):
            scores = np.exp([scale * queries[t][h] @ keys[s][h] for s in range(t + 1)])
            out[t, h] = scores / scores.sum() @ np.array([values[s][h] for s in range(t + 1)])
    return out.reshape(length, -1) @ k['out']['kernel'].T


@pytest.mark.parametrize('scale', [None, 0.7])
def test_one_layer_by_hand(scale):
    with jax.enable_x64(True):
        one = Segment((dataclasses.replace(CFG.segments[0].kinds[0], attention_scale=scale),), 1)
        cfg = dataclasses.replace(CFG, segments=(one,))
        params = random_params(cfg, 'float64')
        layer = jax.tree.map(lambda leaf: leaf[0], params['layers'][0][0])
        taps = jax.jit(
            lambda p: (
                forward(cfg, p, TOKENS[:1], taps=('embed.output', 'layers.0.output'), compute=Compute('float64')).taps
            )
        )(params)
        before, after = (np.asarray(taps[name][0]) for name in ('embed.output', 'layers.0.output'))

        def norm(x, weight):
            return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps) * weight

        hidden = before + by_hand(cfg, layer['attn'], norm(before, layer['attn_norm']['scale']), scale or 9**-0.5)
        normed, mlp = norm(hidden, layer['mlp_norm']['scale']), layer['mlp']
        gate = normed @ mlp['gate']['kernel'].T
        inner = gate / (1 + np.exp(-gate)) * (normed @ mlp['up']['kernel'].T)
        np.testing.assert_allclose(
            after, hidden + inner @ mlp['down']['kernel'].T, rtol=0, atol=1e-6
        )  # of a float32 angle
