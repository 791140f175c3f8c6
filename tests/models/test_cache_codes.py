"""Keys and values in eight bits: codes by the formula, the same numbers with a cache and without, half the bytes."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jpt
from jpt.data.batch import empty_batch
from jpt.kernels.cache_codes import cache_codes, cache_numbers, cache_rounded
from jpt.models.cache import init_cache
from jpt.models.calibration import calibrate
from jpt.models.config import Compute, Latent, LayerKind, ModelConfig, Rope, Segment
from jpt.models.transformer import forward, init
from jpt.quant.statistics import CACHE, LARGEST
from jpt.quantization.kv_cache import bytes_per_token

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'quantized'
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)
LATENT = ModelConfig(
    'deepseek_v3', 61, 20, 4, 4, 10, (Segment((LayerKind(Rope(), None, 24),), 2),), 64,
    latent=Latent(rank=8, rope_dim=4, nope_dim=6, value_dim=5, query_rank=None, norm_eps=1e-6),
)  # fmt: skip


@pytest.fixture
def double_precision():
    with jax.enable_x64(True):
        yield


def by_formula(x, scale):
    """E4M3 of the quotient that float32 rounds from the exact one."""
    quotient = (np.asarray(x, np.float64) / np.float64(np.float32(scale))).astype(np.float32)
    return np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_codes_are_the_formulas(dtype):
    """Of all sizes, beyond the largest too, under scales that no power of two is."""
    drawn = np.random.default_rng(1)
    x = (drawn.standard_normal((64, 256)) * np.exp2(drawn.uniform(-14, 10, (64, 256)))).astype(np.float32)
    x = jnp.asarray(x, dtype)
    encode = jax.jit(cache_codes)
    for scale in (np.float32(0.0070452), np.float32(1), np.float32(3) / 7):
        found = encode(x, scale)
        wanted = by_formula(x, scale)
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), wanted.view(np.uint8))
        numbers = np.asarray(cache_numbers(found, jnp.asarray(scale), 'float32'))
        np.testing.assert_array_equal(numbers, wanted.astype(np.float32) * scale)
        np.testing.assert_array_equal(
            np.asarray(cache_rounded(x, jnp.asarray(scale)), np.float32), numbers.astype(dtype).astype(np.float32)
        )
    assert np.isnan(np.asarray(cache_codes(jnp.full(2, jnp.nan), jnp.ones(())), np.float32)).all()


def test_gradients_go_straight_through():
    x, dy = jnp.asarray([0.3, -1000.0, 0.0]), jnp.asarray([1.0, 2.0, 3.0])
    _, pull = jax.vjp(cache_rounded, x, jnp.float32(0.5))
    dx, dscale = pull(dy)
    np.testing.assert_array_equal(dx, dy)
    assert dscale == 0


def with_codes(cfg, dtype='float64'):
    """The model with a cache of codes, parameters of no particular values, scales of its own for every layer."""
    cfg = dataclasses.replace(cfg, kv_cache='fp8')
    keys = iter(jax.random.split(jax.random.key(2), 99))
    params = jax.tree.map(
        lambda leaf: (leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)).astype(dtype),
        init(cfg, jax.random.key(1)),
    )
    drawn = np.random.default_rng(3)
    for kinds in params['layers']:
        for layer in kinds:
            attention = layer['attn']
            for name in {'k_scale', 'v_scale'} & set(attention):
                attention[name] = jnp.asarray(drawn.uniform(0.01, 0.03, attention[name].shape), jnp.float32)
    return cfg, params


def plain(cfg):
    return dataclasses.replace(cfg, kv_cache='as_computed')


def run(cfg, params, attention='dense'):
    """The pass over some tokens, with a cache or without: hidden states and the cache."""
    compute = Compute('float64', attention=attention)
    step = jax.jit(lambda tokens, cache: forward(cfg, params, tokens, cache=cache, compute=compute)[:2])
    return lambda tokens, cache=None: step(tokens, cache)


@pytest.mark.parametrize('attention', ['auto', 'blockwise'])
@pytest.mark.parametrize('name', ['mixed', 'latent'])
def test_decoding_from_codes_is_the_full_pass_that_rounds(name, attention, mixed, double_precision):
    """A long prompt, then a few tokens at once, then one by one: on codes ('auto'), and on what they stand for."""
    cfg, params = with_codes(mixed if name == 'mixed' else LATENT)
    wanted, _ = run(cfg, params)(TOKENS)
    rounded_off = np.abs(np.asarray(wanted - run(plain(cfg), params)(TOKENS)[0])).max()
    assert rounded_off > 0.03
    step = run(cfg, params, attention)
    found, cache = step(TOKENS[:, :33], init_cache(cfg, 2, 40, 'float64'))
    found = [found]
    for start, end in ((33, 37), (37, 38), (38, 39), (39, 40)):
        hidden, cache = step(TOKENS[:, start:end], cache)
        found.append(hidden)
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-6 * rounded_off)

    # The first layer reads nothing rounded, so its codes are those of a plain cache.
    _, kept = run(plain(cfg), params)(TOKENS, init_cache(plain(cfg), 2, 40, 'float64'))
    for entry, numbers, scale in zip(cache.layers[0][0], kept.layers[0][0], ('k_scale', 'v_scale'), strict=False):
        assert entry.dtype == jnp.float8_e4m3fn
        assert entry.shape == numbers.shape
        first = by_formula(np.asarray(numbers[0], np.float32), params['layers'][0][0]['attn'][scale][0])
        np.testing.assert_array_equal(np.asarray(entry[0]).view(np.uint8), first.view(np.uint8))


def test_a_cache_of_codes_has_half_the_bytes_of_bfloat16(mixed):
    def size(cfg):
        entries = jax.tree.leaves(jax.eval_shape(lambda: init_cache(cfg, 2, 40, 'bfloat16').layers))
        return sum(entry.size * entry.dtype.itemsize for entry in entries)

    for cfg, per_token in ((mixed, 7 * 2 * 2 * 6), (LATENT, 2 * 12)):
        codes = dataclasses.replace(cfg, kv_cache='fp8')
        assert size(codes) == 2 * 40 * per_token
        assert size(cfg) == 2 * size(codes)
        assert bytes_per_token(codes, 'bfloat16') == per_token


def test_scales_stay_in_float32():
    params = init(dataclasses.replace(LATENT, kv_cache='fp8'), jax.random.key(0), 'bfloat16')['layers'][0][0]['attn']
    assert params['k_scale'].dtype == 'float32'
    assert params['out']['kernel'].dtype == 'bfloat16'
    assert 'v_scale' not in params  # one latent is both


def test_statistics_are_the_largest_that_a_cache_keeps_of_real_tokens(mixed):
    """Two batches; what stands in padding is larger than all else."""
    params = init(mixed, jax.random.key(1))
    params['embed']['embedding'] = params['embed']['embedding'].at[60].multiply(100)
    batches, wanted = [], []
    for part in (TOKENS[:, :9] % 60, TOKENS[:, 9:18] % 60):
        batch = empty_batch(2, 12)
        batch.tokens[...], batch.tokens[:, :9] = 60, part
        batch.positions[:, :9], batch.segment_ids[:, :9] = np.arange(9), 1
        batches.append(batch)
        cache = init_cache(mixed, 2, 12, 'float32')
        inputs = batch.tokens, batch.positions, batch.segment_ids
        layers = jax.jit(lambda inputs, cache: forward(mixed, params, *inputs, cache).cache)(inputs, cache).layers
        kept = [[(entry.keys[..., :9], entry.values[..., :9, :]) for entry in kinds] for kinds in layers]
        wanted.append(jax.tree.map(lambda x: np.abs(x).max((-4, -3, -2, -1)), kept))
    found = calibrate(mixed, params, batches, (CACHE,)).layers
    for segment, kinds in enumerate(found):
        for kind, node in enumerate(kinds):
            for at, name in enumerate('kv'):
                largest = np.maximum(wanted[0][segment][kind][at], wanted[1][segment][kind][at])
                measured = node['attn']['cache'][name][LARGEST]
                np.testing.assert_allclose(measured, np.broadcast_to(largest, measured.shape), rtol=1e-5)


def test_scales_by_calibration_are_those_of_modelopt():
    """On the tokens that it saw, in bfloat16 as it did; the two frameworks round the way there differently."""
    directory = GOLDEN / 'modelopt_fp8_kv'
    model = jpt.load(GOLDEN / 'llama')
    tokens = np.load(directory / 'golden.npz')['calibration']
    batch = empty_batch(*tokens.shape)
    batch.tokens[...], batch.positions[...], batch.segment_ids[...] = tokens, np.arange(tokens.shape[1]), 1
    node = calibrate(model.config, model.params, [batch], (CACHE,), model.compute).layers[0][0]['attn']['cache']
    theirs = jpt.load(directory).params['layers'][0][0]['attn']
    for name in 'kv':
        np.testing.assert_allclose(node[name][LARGEST] / 448, theirs[f'{name}_scale'], rtol=2.0**-7)
