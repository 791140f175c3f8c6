"""Rotary frequencies against their published closed forms, in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jpt.models.config import Rope
from jpt.models.rope import apply_rope, rope_table


def angles(rope, head_dim, positions, segments=None):
    """Angles recovered from the table: [B, T, H/2], modulo a turn; and the length of (cos, sin)."""
    positions = jnp.asarray(positions, jnp.int32)
    segments = jnp.ones_like(positions) if segments is None else jnp.asarray(segments, jnp.int32)
    cos, sin = rope_table(rope, head_dim, positions, segments, 'float32')
    return np.arctan2(sin, cos), np.hypot(sin, cos)


def first_frequencies(rope, head_dim):
    """Frequencies, read off position 1, where no angle has made a turn."""
    turn, _ = angles(rope, head_dim, [[1]])
    return turn[0, 0]


def base(theta, head_dim):
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def test_default_and_linear():
    np.testing.assert_allclose(first_frequencies(Rope(500.0), 8), base(500.0, 8), rtol=1e-5)
    np.testing.assert_allclose(first_frequencies(Rope(500.0, 'linear', 4.0), 8), base(500.0, 8) / 4, rtol=1e-5)


@pytest.mark.parametrize(('theta', 'head_dim'), [(1e4, 128), (5e5, 128), (1e6, 256), (150_000.0, 96)])
def test_frequencies_are_correctly_rounded_so_that_far_positions_have_the_angles_of_other_libraries(theta, head_dim):
    """One unit in the last place of a frequency would turn position 40,000 by up to 0.004."""
    exponents = [float(np.float32(i) / np.float32(head_dim)) for i in range(0, head_dim, 2)]
    frequencies = np.float32(1) / np.array([math.pow(theta, e) for e in exponents]).astype(np.float32)
    turns = np.float32(40_000) * frequencies
    cos, sin = rope_table(Rope(theta), head_dim, jnp.array([[40_000]]), jnp.ones((1, 1), jnp.int32), 'float32')
    np.testing.assert_allclose(cos[0, 0], np.cos(turns.astype(np.float64)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(turns.astype(np.float64)), rtol=0, atol=1e-6)


def test_llama3_keeps_short_waves_and_divides_long_ones():
    rope = Rope(5e5, 'llama3', 8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, found = base(5e5, 64), first_frequencies(rope, 64)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(found[short], plain[short], rtol=1e-4)
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=1e-4)
    middle = ~short & ~long
    assert middle.any()
    smooth = (8192 / wavelength[middle] - 1) / 3
    np.testing.assert_allclose(found[middle], (1 - smooth) * plain[middle] / 8 + smooth * plain[middle], rtol=1e-4)


def test_llama3_without_a_width_to_blend_over_keeps_or_divides():
    """As Llama 4 Scout has it: both factors 1."""
    rope = Rope(5e5, 'llama3', 16.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=1.0)
    plain = base(5e5, 128)
    wanted = np.where(2 * math.pi / plain < 8192, plain, plain / 16)
    assert 0 < np.sum(wanted == plain) < len(plain)
    np.testing.assert_allclose(first_frequencies(rope, 128), wanted, rtol=1e-4)


def test_yarn_ramps_between_the_two_rotations_and_stretches_the_vectors():
    rope = Rope(1e4, 'yarn', 4.0, original_length=2048)
    plain, found = base(1e4, 128), first_frequencies(rope, 128)

    def dimension(rotations):
        return 128 * math.log(2048 / (rotations * 2 * math.pi)) / (2 * math.log(1e4))

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    np.testing.assert_allclose(found[:low], plain[:low], rtol=1e-4)
    np.testing.assert_allclose(found[high:], plain[high:] / 4, rtol=1e-4)
    halfway = (low + high) // 2
    share = (halfway - low) / (high - low)
    expected = plain[halfway] * ((1 - share) + share / 4)
    np.testing.assert_allclose(found[halfway], expected, rtol=1e-4)
    _, length = angles(rope, 128, [[1]])
    np.testing.assert_allclose(length, 0.1 * math.log(4.0) + 1, rtol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'length'),
    [
        ({'attention_factor': 0.7}, 0.7),
        ({'mscale': 2.0, 'mscale_all_dim': 1.0}, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({'mscale': 2.0}, 0.1 * math.log(4) + 1),
    ],
)
def test_yarn_attention_factor(fields, length):
    _, found = angles(Rope(1e4, 'yarn', 4.0, original_length=64, **fields), 8, [[3]])
    np.testing.assert_allclose(found, length, rtol=1e-5)


def test_dynamic_grows_with_each_segment_alone():
    """Three texts in a row of 24: only the one longer than 8 gets another base, and padding counts for none."""
    rope = Rope(1e4, 'dynamic', 2.0, original_length=8)
    positions = np.concatenate([np.arange(5), np.arange(12), np.arange(3), np.zeros(4)])[None]
    segments = np.repeat([1, 2, 3, 0], [5, 12, 3, 4])[None]
    turn, _ = angles(rope, 8, positions, segments)
    np.testing.assert_allclose(turn[0, 1], base(1e4, 8), rtol=1e-5)
    np.testing.assert_allclose(turn[0, 18], base(1e4, 8), rtol=1e-5)
    theta = 1e4 * (2.0 * 12 / 8 - 1) ** (8 / 6)
    np.testing.assert_allclose(turn[0, 6], base(theta, 8), rtol=1e-5)


def test_rotation_turns_the_two_halves_and_keeps_the_dtype():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    cos, sin = rope_table(Rope(100.0), 8, jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32), 'float32')
    turned = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arange(3)[:, None] * base(100.0, 8))[None, :, None, :]
    np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], -1), atol=1e-5)
    assert apply_rope(jnp.asarray(x, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match='longrope'):
        rope_table(Rope(kind='longrope'), 8, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32), 'float32')
