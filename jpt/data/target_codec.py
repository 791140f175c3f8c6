"""The bytes of what a teacher said of one piece of a document: its likeliest words of every position.

Ids take as many bits as the vocabulary needs, in planes of bytes and then of bits. Log-probabilities come in falling
order, so the numbers that encode their magnitudes rise: what is kept are the steps from one to the next, small numbers
whose bytes compress well. Both is exact; only rounding to the storage dtype loses anything.
"""

import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jpt.kernels.sparse_target import SparseTarget


class Rounding(NamedTuple):
    """How log-probabilities are kept: the dtype on disk, the dtype that training reads, the largest relative error."""

    stored: np.dtype
    read: np.dtype
    relative_error: float


ROUNDINGS = {
    'bfloat16': Rounding(np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.bfloat16), 2.0**-8),
    'float16': Rounding(np.dtype(np.float16), np.dtype(np.float16), 2.0**-11),
    # What a word has less than the likeliest one, times a scale per position that makes 448 of the largest: the error
    # is 2^-4 of that difference, and the likeliest word has its log-probability whole.
    'float8_e4m3fn': Rounding(np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float16), 2.0**-4 + 2.0**-11),
}
_LARGEST_FP8 = 448.0
_HEAD = struct.Struct('<IHBB')  # positions, words of a position, bits of an id, whether some positions have fewer


class PieceTargets(NamedTuple):
    """What was said of n positions: the target [n, J] with log_tail [n], and the next words' log-probabilities [n]."""

    target: SparseTarget
    sampled_logp: np.ndarray


def encode_targets(piece: PieceTargets, dtype: str, vocab_size: int) -> bytes:
    """The bytes of a piece. target: ids int32, -1 behind the last word of a position; logp in falling order, float32.

    Tail and next word are kept in float32 whatever `dtype` says, one of ROUNDINGS.
    """
    ids, logp = piece.target.ids, piece.target.logp
    assert piece.target.log_tail is not None
    used = ids >= 0
    ragged, bits = not used.all(), max(int(vocab_size - 1).bit_length(), 1)
    codes, scaling = _codes(np.where(used, -np.minimum(logp, 0), 0), dtype)
    steps = np.diff(codes, axis=-1, prepend=codes.dtype.type(0))
    parts = [_HEAD.pack(*ids.shape, bits, ragged)]
    if ragged:
        parts.append(used.sum(axis=-1).astype('<u2').tobytes())
    parts += [np.asarray(x, '<f4').tobytes() for x in (piece.target.log_tail, piece.sampled_logp, *scaling)]
    parts += [_id_planes(ids[used], bits), _byte_planes(steps[used])]
    return b''.join(parts)


def decode_targets(data: bytes, dtype: str) -> PieceTargets:
    """The piece of `encode_targets`; logp in the dtype that training reads, -inf where ids are -1."""
    (n, words, bits, ragged), at = _HEAD.unpack_from(data), _HEAD.size

    def take(kind: str, count: int) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(data, kind, count, at)
        at += values.nbytes
        return values

    used = np.ones((n, words), bool)
    if ragged:
        used = np.arange(words)[None] < take('<u2', n)[:, None]
    log_tail, sampled = take('<f4', n), take('<f4', n)
    rounding = ROUNDINGS[dtype]
    scaling = (take('<f4', n), take('<f4', n)) if rounding.stored.itemsize == 1 else None
    count = int(used.sum())
    found = np.zeros(count, np.int32)
    for k in range(bits // 8):
        found |= take('u1', count).astype(np.int32) << (8 * k)
    for k in range(bits // 8 * 8, bits):
        plane = np.unpackbits(take('u1', -(-count // 8)), count=count, bitorder='little')
        found |= plane.astype(np.int32) << k
    size = rounding.stored.itemsize
    steps = np.zeros((n, words), f'u{size}')
    steps[used] = sum(take('u1', count).astype(f'u{size}') << (8 * k) for k in range(size))
    magnitudes = np.cumsum(steps, axis=-1, dtype=f'u{size}').view(rounding.stored)
    if scaling is not None:
        first, scale = (x[:, None] for x in scaling)
        magnitudes = (first + magnitudes.astype(np.float32) * scale).astype(rounding.read)
    ids = np.full((n, words), -1, np.int32)
    ids[used] = found
    logp = np.where(used, -magnitudes, np.array(-np.inf, rounding.read))
    return PieceTargets(SparseTarget(ids, logp, log_tail), sampled)


def _codes(magnitudes: np.ndarray, dtype: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Unsigned integers that rise as the magnitudes do, and what they are scaled by: first and scale [n], or none."""
    stored = ROUNDINGS[dtype].stored
    if stored.itemsize == 1:
        first = magnitudes[:, 0].astype(np.float32)
        more = np.maximum(magnitudes - first[:, None], 0)
        largest = more.max(axis=-1).astype(np.float32)
        scale = np.where(largest > 0, largest / np.float32(_LARGEST_FP8), 1).astype(np.float32)
        return np.minimum(more / scale[:, None], _LARGEST_FP8).astype(stored).view('u1'), [first, scale]
    return np.minimum(magnitudes, float(ml_dtypes.finfo(stored).max)).astype(stored).view('u2'), []


def _id_planes(ids: np.ndarray, bits: int) -> bytes:
    """Whole bytes first, then the bits that are left, eight ids to a byte."""
    planes = [(ids >> (8 * k)).astype('u1').tobytes() for k in range(bits // 8)]
    rest = [((ids >> k) & 1).astype('u1') for k in range(bits // 8 * 8, bits)]
    return b''.join(planes + [np.packbits(plane, bitorder='little').tobytes() for plane in rest])


def _byte_planes(values: np.ndarray) -> bytes:
    return b''.join((values >> (8 * k)).astype('u1').tobytes() for k in range(values.dtype.itemsize))
