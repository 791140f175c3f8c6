"""The bytes of recorded targets: ids and masses come back exactly, log-probabilities to the error that is stated."""

import ml_dtypes
import numpy as np
import pytest

from jpt.data.target_codec import ROUNDINGS, PieceTargets, decode_targets, encode_targets
from jpt.kernels.sparse_target import SparseTarget


def draw(vocab, n=37, words=9, ragged=False, seed=0):
    """Words of random distributions, some nearly sure of one word, all of them different ids."""
    rng = np.random.default_rng(seed)
    words = min(words, vocab)
    ids = np.stack([rng.permutation(vocab)[:words] for _ in range(n)]).astype(np.int32)
    ids[0, 0] = vocab - 1 if vocab - 1 not in ids[0] else ids[0, 0]
    logits = np.sort(rng.normal(size=(n, words)) * rng.choice([0.1, 3, 30], (n, 1)), axis=-1)[:, ::-1]
    logp = (logits - np.log(np.exp(logits - logits[:, :1]).sum(-1, keepdims=True)) - logits[:, :1]).astype(np.float32)
    if ragged:
        unused = np.arange(words)[None] >= rng.integers(1, words + 1, (n, 1))
        ids, logp = np.where(unused, -1, ids), np.where(unused, -np.inf, logp)
    log_tail, sampled = rng.normal(-5, 3, (2, n)).astype(np.float32)
    log_tail[1] = -np.inf  # nothing was left out
    return PieceTargets(SparseTarget(ids.astype(np.int32), logp.astype(np.float32), log_tail), sampled)


@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize('dtype', ROUNDINGS)
@pytest.mark.parametrize('vocab', [2, 256, 257, 4096, 131072, 248320])
def test_what_comes_back(vocab, dtype, ragged):
    piece = draw(vocab, ragged=ragged)
    data = encode_targets(piece, dtype, vocab)
    found = decode_targets(data, dtype)
    np.testing.assert_array_equal(found.target.ids, piece.target.ids)
    np.testing.assert_array_equal(found.target.log_tail, piece.target.log_tail)
    np.testing.assert_array_equal(found.sampled_logp, piece.sampled_logp)
    used = piece.target.ids >= 0
    assert found.target.logp.dtype == ROUNDINGS[dtype].read
    assert np.isneginf(found.target.logp[~used].astype(np.float32)).all()
    logp, wanted = found.target.logp.astype(np.float64)[used], piece.target.logp.astype(np.float64)[used]
    # Relative, and near 0 (a word that is all but sure) within the smallest number of the dtype.
    scale = np.abs(np.where(used, piece.target.logp, 0)).max(-1, keepdims=True) / 448 * np.ones(used.shape)
    small = 2.0**-24 + (2.0**-9 * scale[used] if 'float8' in dtype else 0)
    assert (np.abs(logp - wanted) <= ROUNDINGS[dtype].relative_error * np.abs(wanted) + small).all()
    if dtype == 'bfloat16':  # exactly the rounding of the library
        np.testing.assert_array_equal(logp, wanted.astype(ml_dtypes.bfloat16).astype(np.float64))


def test_the_stated_error_is_nearly_reached():
    """So that it is the error, and not any large number."""
    rng = np.random.default_rng(0)
    logp = -np.sort(rng.uniform(0.5, 20, (400, 64)), axis=-1).astype(np.float32)
    ids = np.tile(np.arange(64, dtype=np.int32), (400, 1))
    piece = PieceTargets(SparseTarget(ids, logp, np.zeros(400, np.float32)), np.zeros(400, np.float32))
    for dtype, rounding in ROUNDINGS.items():
        found = decode_targets(encode_targets(piece, dtype, 64), dtype).target.logp.astype(np.float64)
        worst = (np.abs(found - logp) / np.abs(logp)).max()
        assert 0.8 * rounding.relative_error < worst <= rounding.relative_error


def test_ids_take_the_bits_of_the_vocabulary():
    """Without the words' values (bytes each) and the two masses: 17 bits an id for 131,072 words, 8 for 256."""
    for vocab, bits in ((256, 8), (131072, 17), (131073, 18)):
        piece = draw(vocab, n=64, words=8)
        values, head = 64 * 8 * 2 + 64 * 8, 8
        assert len(encode_targets(piece, 'float16', vocab)) == head + values + 64 * 8 * bits // 8
