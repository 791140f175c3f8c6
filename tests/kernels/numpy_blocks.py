"""Codes with scales of 128 columns, and what products of them are in float64."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn


def codes(random, shape):
    """Any finite E4M3 numbers."""
    drawn = random.integers(0, 256, shape).astype(np.uint8)
    return np.where(drawn & 127 == 127, 0, drawn).astype(np.uint8).view(E4M3)


def scales(random, shape):
    """Of very different sizes."""
    return (random.uniform(1, 2, shape) * 2.0 ** random.integers(-12, 3, shape)).astype(np.float32)


def operands(M, N, K, groups=(), seed=0, each=False):
    """a, a_scale, b, b_scale; b and its scales with a leading axis of groups if asked for, or a scale for each row."""
    random = np.random.default_rng(seed)
    rows, blocks = N if each else -(-N // 128), -(-K // 128)
    a, b = codes(random, (M, K)), codes(random, (*groups, N, K))
    return a, scales(random, (M, blocks)), b, scales(random, (*groups, rows, blocks))


def numbers(codes, scales, rows):
    """code * scale in float64, with a scale for every `rows` x 128."""
    *_, N, K = codes.shape
    wide = scales.astype(np.float64).repeat(rows, -2).repeat(128, -1)[..., :N, :K]
    return codes.astype(np.float64) * wide


def product(a, a_scale, b, b_scale, each=False):
    """y [M, N] and the sum of all magnitudes behind each of its elements, for tolerances; both in float64."""
    left, right = numbers(a, a_scale, 1), numbers(b, b_scale, 1 if each else 128)
    return left @ right.T, np.abs(left) @ np.abs(right).T


def assert_close(found, wanted, size, dtype=np.float32):
    """Within float32's rounding of the sum, and one rounding to `dtype`."""
    step = float(ml_dtypes.finfo(dtype).eps) / 2
    error = np.abs(np.asarray(found, np.float64) - wanted)
    assert found.dtype == dtype
    assert (error <= 2e-6 * size + 1.01 * step * np.abs(wanted)).all(), (error / size).max()
