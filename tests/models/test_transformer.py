"""The forward pass against itself in other forms: layer by layer, cached, packed, rematerialized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpt.models.attention import Where
from jpt.models.block import apply_block
from jpt.models.cache import init_cache
from jpt.models.config import Compute, LayerKind, ModelConfig, Rope, Segment, runs_of
from jpt.models.transformer import embed, final_norm, forward, init, locate, unembed

PLAIN = Compute(attention='dense')
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 17)).astype(np.int32)


def layer_by_layer(cfg, params, tokens):
    """Hidden states before each layer and after the last, without any scan."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    where: Where = locate(cfg, positions, jnp.ones_like(positions), 'float32')
    states = [embed(cfg, params, tokens, positions, PLAIN)]
    for s, segment in enumerate(cfg.segments):
        for r in range(segment.repeats):
            for k, kind in enumerate(segment.kinds):
                layer = jax.tree.map(lambda leaf, r=r: leaf[r], params['layers'][s][k])
                states.append(apply_block(cfg, kind, PLAIN)(layer, states[-1], where)[0])
    return states


@pytest.fixture(scope='module')
def whole(mixed, mixed_params):
    """One compiled forward pass with taps, and the same computed layer by layer."""
    taps = ('embed.output', 'layers.0.input', 'layers.2.output', 'layers.6.input', 'final_norm.output')
    run = jax.jit(lambda p, t: forward(mixed, p, t, taps=taps, compute=PLAIN))
    return run(mixed_params, TOKENS), jax.jit(lambda p, t: layer_by_layer(mixed, p, t))(mixed_params, TOKENS)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


def test_scanned_segments_equal_the_layers_one_by_one(mixed, mixed_params, whole):
    out, states = whole
    close(out.hidden_BTD, final_norm(mixed, mixed_params, states[-1]))


def test_taps_are_the_hidden_states_of_their_names(whole):
    out, states = whole
    wanted = {'embed.output': 0, 'layers.0.input': 0, 'layers.2.output': 3, 'layers.6.input': 6}
    assert set(out.taps) == {*wanted, 'final_norm.output'}
    for name, index in wanted.items():
        close(out.taps[name], states[index])
    close(out.taps['final_norm.output'], out.hidden_BTD)


@pytest.mark.parametrize('name', ['layers.7.input', 'layers.-1.output', 'layers.0', 'head'])
def test_unknown_tap_is_named(mixed, mixed_params, name):
    with pytest.raises(ValueError, match=r"'layers\.N\.input'"):
        forward(mixed, mixed_params, TOKENS, taps=(name,))


def test_cached_decode_equals_the_full_pass_with_ragged_rows(mixed, mixed_params, whole):
    """Row 1 is three tokens shorter: its padding is in no segment, and its later tokens keep their own positions."""
    out, _ = whole
    lengths = np.array([9, 6])
    slots = init_cache(mixed, 2, 17, 'float32')

    @jax.jit
    def step(params, tokens, positions, segments, cache):
        result = forward(mixed, params, tokens, positions, segments, cache, compute=PLAIN)
        return result.hidden_BTD, result.cache

    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    segments = (positions < lengths[:, None]).astype(np.int32)
    hidden, cache = step(mixed_params, TOKENS[:, :9], positions, segments, slots)
    for row in range(2):
        close(hidden[row, : lengths[row]], out.hidden_BTD[row, : lengths[row]])
    for offset in range(8):
        at = lengths + offset
        tokens = TOKENS[np.arange(2), at][:, None]
        hidden, cache = step(mixed_params, tokens, at[:, None].astype(np.int32), np.ones((2, 1), np.int32), cache)
        for row in range(2):
            close(hidden[row, 0], out.hidden_BTD[row, at[row]])


def test_packing_leaks_nothing(mixed, mixed_params, whole):
    """Two texts in one row give what each gives alone."""
    out, _ = whole
    packed = np.concatenate([TOKENS[0, :10], TOKENS[1, :7]])[None]
    positions = np.concatenate([np.arange(10), np.arange(7)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [10, 7])[None].astype(np.int32)
    hidden = jax.jit(lambda p: forward(mixed, p, packed, positions, segments, compute=PLAIN).hidden_BTD)(mixed_params)
    close(hidden[0, :10], out.hidden_BTD[0, :10])
    close(hidden[0, 10:], out.hidden_BTD[1, :7])


def test_rematerialization_changes_no_gradient(mixed):
    """Every policy in one program, on two layers."""
    cfg = dataclasses.replace(mixed, segments=runs_of(mixed.segments[0].kinds[:1] * 2))
    params = init(cfg, jax.random.key(3))

    def gradient(params, remat):
        run = dataclasses.replace(PLAIN, remat=remat)
        return jax.grad(lambda p: jnp.sum(jnp.square(forward(cfg, p, TOKENS[:, :5], compute=run).hidden_BTD)))(params)

    policies = ('none', 'full', 'dots', 'save:attention,mlp_up')
    plain, *others = jax.jit(lambda p: [gradient(p, remat) for remat in policies])(params)
    for other in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(a))))


@pytest.mark.parametrize('remat', ['some', 'save:', 'save:keys', 'offload:nothing'])
def test_unknown_remat_is_named(mixed, remat):
    with pytest.raises(ValueError, match='mlp_gate'):
        apply_block(mixed, mixed.segments[0].kinds[0], Compute(remat=remat))


def test_padded_vocabulary_rows_get_no_probability(mixed, mixed_params):
    padded = dict(mixed_params, embed={'embedding': jnp.pad(mixed_params['embed']['embedding'], ((0, 3), (0, 0)))})
    hidden = jnp.ones((1, 2, 20))
    logits = unembed(mixed, padded, hidden)
    assert logits.shape == (1, 2, 64)
    assert np.all(np.isneginf(logits[..., 61:]))
    close(logits[..., :61], unembed(mixed, mixed_params, hidden), 1e-6)


def test_stacked_leaves_have_the_repeats_first(mixed):
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: init(mixed, jax.random.key(0))))
    assert [len(segment) for segment in shapes['layers']] == [3, 1]
    assert shapes['layers'][0][2]['attn']['q']['kernel'] == (2, 24, 20)
    assert shapes['layers'][1][0]['mlp']['down']['kernel'] == (1, 20, 24)
    assert set(shapes) == {'embed', 'layers', 'final_norm'}


def test_a_kernel_of_the_wrong_shape_is_named(mixed, mixed_params):
    wrong = jax.tree.map(lambda x: x, mixed_params)
    wrong['layers'][0][0]['mlp']['up']['kernel'] = jnp.zeros((2, 25, 20))
    with pytest.raises(ValueError, match=r'mlp/up/kernel has shape \(25, 20\).*\(24, 20\)'):
        forward(mixed, wrong, TOKENS)


def test_layers_are_numbered_period_by_period(mixed):
    kinds = list(mixed.layer_kinds())
    assert [kind.window for kind in kinds] == [5, 5, None, 5, 5, None, 5]
    places = [
        (s, k, r) for s, seg in enumerate(mixed.segments) for r in range(seg.repeats) for k in range(len(seg.kinds))
    ]
    assert [mixed.layer_index(s, k, r) for s, k, r in places] == list(range(7))
    assert mixed.ropes() == (Rope(1e4), Rope(1e6, 'linear', 8.0))


def test_runs_find_the_shortest_period_or_split():
    a, b = LayerKind(window=1), LayerKind(window=2)
    assert runs_of((a, a, a)) == (Segment((a,), 3),)
    assert runs_of((a, b, a, b, a)) == (Segment((a, b), 2), Segment((a,), 1))
    assert runs_of((a, a, b, b, b)) == (Segment((a,), 2), Segment((b,), 3))


def test_a_hybrid_of_52_layers_traces_13():
    """The pattern of Nemotron-H-8B: eleven layers four times, then two layers four times."""
    kinds = {'M': LayerKind(mixer='mamba'), '*': LayerKind(), '-': LayerKind(mlp_width=8, mixer='none')}
    pattern = 'M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-'
    segments = runs_of(tuple(kinds[letter] for letter in pattern))
    assert [(len(segment.kinds), segment.repeats) for segment in segments] == [(11, 4), (2, 4)]
    again = [kind for segment in segments for kind in segment.kinds * segment.repeats]
    assert again == [kinds[letter] for letter in pattern]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_no_other_segments_trace_fewer_layers(numbers):
    def fewest(rest: tuple[int, ...]) -> int:
        """By trying every first segment."""
        if not rest:
            return 0
        found = []
        for period in range(1, len(rest) + 1):
            for repeats in range(1, len(rest) // period + 1):
                if rest[: period * repeats] == rest[:period] * repeats:
                    found.append(period + fewest(rest[period * repeats :]))
        return min(found)

    segments = runs_of(tuple(LayerKind(window=number + 1) for number in numbers))
    assert [k.window - 1 for s in segments for k in s.kinds * s.repeats] == numbers
    assert sum(len(segment.kinds) for segment in segments) == fewest(tuple(numbers))


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [('num_kv_heads', 3, 'divisor'), ('head_dim', 5, 'even'), ('vocab_size', 0, 'positive'), ('segments', (), 'layer')],
)
def test_impossible_configs_are_refused(mixed, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(mixed, **{field: value})


def test_bfloat16_keeps_statistics_in_float32(mixed, mixed_params):
    """A bfloat16 pass stays near the float32 one, and its logits are float32."""
    cfg: ModelConfig = mixed
    run = jax.jit(lambda p, t: forward(cfg, p, t, compute=Compute(dtype='bfloat16', attention='dense')).hidden_BTD)
    hidden = run(mixed_params, TOKENS)
    assert hidden.dtype == jnp.bfloat16
    assert unembed(cfg, mixed_params, hidden).dtype == jnp.float32
