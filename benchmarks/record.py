"""Recorded targets: bytes per token on disk, what rounding costs, and the time to write and to read them.

    python benchmarks/record.py [--tokens=16384] [--json]

The quickstart teacher on held-out modules of Python's standard library; and, for the size of a large vocabulary, drawn
distributions of 131,072 words (a Zipf prior times noise), which are no teacher's. Of the gradient: that of the forward
KL with a bucket for the tail, recorded against unrounded, ||g - g_exact|| / ||g_exact|| over the logits of 512 tokens;
the student is the teacher with noise on its logits.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine

import jpt
from jpt.data.pipeline import DataConfig, make_pipeline
from jpt.data.target_codec import ROUNDINGS, PieceTargets, decode_targets, encode_targets
from jpt.data.target_store import HEAD, Piece, hash_of, open_part, part_path, write_part
from jpt.kernels.divergences import Divergence
from jpt.kernels.likely_words import Likely, likely_words
from jpt.kernels.sparse_target import SparseTarget, sparse_divergence
from jpt.kernels.vocab_shard import VocabShard
from jpt.models.transformer import forward, head_kernel

LENGTH, WORDS, LARGE = 256, (8, 64, 256), 131072


def teacher_hidden(tokens: int) -> tuple[Any, Any, Any]:
    """Hidden states [N, D] of the quickstart teacher on full rows, its head, and the next ids."""
    model = jpt.load('quickstart', dtype='float32')
    assert model.tokenizer is not None
    data = DataConfig(paths=('stdlib:held_out',), packing='concat')
    batch = next(
        make_pipeline(data, model.tokenizer, batch_size=tokens // LENGTH, seq_len=LENGTH, evaluate=True, num_epochs=1)
    )
    run = jax.jit(lambda p, b: forward(model.config, p, b.tokens, b.positions, b.segment_ids, compute=model.compute))
    hidden = run(model.params, batch._replace(sparse_target=None)).hidden_BTD
    return hidden.reshape(-1, hidden.shape[-1]), head_kernel(model.config, model.params), batch.targets.reshape(-1)


def drawn_hidden(tokens: int) -> tuple[Any, Any, Any]:
    """The same of distributions that are drawn: a bias by rank (Zipf, shuffled) and 63 directions of noise."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((LARGE, 64)).astype(np.float32)
    kernel[:, 0] = -np.log(rng.permutation(LARGE) + 10.0)
    hidden = rng.standard_normal((tokens, 64)).astype(np.float32) * rng.uniform(0.2, 0.6, (tokens, 1)).astype(
        np.float32
    )
    hidden[:, 0] = 1
    return hidden, kernel, rng.integers(0, LARGE, tokens).astype(np.int32)


def gradient(target: SparseTarget, student_CV: Any) -> Any:
    """Of the forward KL with a tail, in the student's logits."""
    vocab = VocabShard((), student_CV.shape[1], student_CV.shape[1])
    return sparse_divergence(Divergence(), 'tail', target, jax.nn.log_softmax(student_CV), vocab)[1]


def pieces_of(said: Likely) -> list[PieceTargets]:
    """Pieces of LENGTH positions."""
    (ids, logp, tail), sampled = jax.device_get(said)
    spans = [slice(i, i + LENGTH) for i in range(0, len(ids), LENGTH)]
    return [PieceTargets(SparseTarget(ids[s], logp[s], tail[s]), sampled[s]) for s in spans]


def measure(pieces: list[PieceTargets], dtype: str, vocab: int, student_CV: Any, folder: Path) -> dict[str, float]:
    """Of one dtype: bytes per token, microseconds per token to write and to read, and errors."""
    tokens, start = len(pieces) * LENGTH, time.perf_counter()
    key, path = hash_of([0]), part_path(folder, 'train', 0)
    encoded = [Piece(key, key, 0, LENGTH, 0, 0, 0, encode_targets(piece, dtype, vocab)) for piece in pieces]
    write_part(path, encoded, {})
    wrote = time.perf_counter()
    reader = open_part(path)
    found = [decode_targets(reader.read([i])[0][HEAD.size :], dtype) for i in range(len(pieces))]
    read = time.perf_counter()
    logp, kept = (np.concatenate([p.target.logp for p in each]).astype(np.float64) for each in (pieces, found))
    exact, rounded = (first_tokens(each, len(student_CV)) for each in (pieces, found))
    wanted = gradient(exact, student_CV)
    return {
        'bytes': path.stat().st_size / tokens,
        'write_us': 1e6 * (wrote - start) / tokens,
        'read_us': 1e6 * (read - wrote) / tokens,
        'moved': float((np.exp(logp) * np.abs(kept - logp)).sum(-1).mean()),
        'gradient': float(jnp.linalg.norm(gradient(rounded, student_CV) - wanted) / jnp.linalg.norm(wanted)),
    }


def first_tokens(pieces: list[PieceTargets], count: int) -> SparseTarget:
    """Targets of the first tokens, in float32."""
    parts = (np.concatenate([np.asarray(p.target[i]) for p in pieces[: -(-count // LENGTH)]]) for i in range(3))
    ids, logp, tail = (part[:count] for part in parts)
    return SparseTarget(jnp.asarray(ids), jnp.asarray(logp.astype(np.float32)), jnp.asarray(tail))


def rows(tokens: int) -> list[dict[str, Any]]:
    """A row for each vocabulary, number of words and dtype."""
    found: list[dict[str, Any]] = []
    for name, (hidden, kernel, after) in {'quickstart': teacher_hidden(tokens), 'drawn': drawn_hidden(tokens)}.items():
        vocab = kernel.shape[0]
        few = 512 if vocab < LARGE else 64
        logits = jnp.asarray(hidden[:few]) @ jnp.asarray(kernel).T
        student = logits + 0.5 * jax.random.normal(jax.random.key(0), logits.shape)
        for words in WORDS:
            said = jax.jit(lambda *a, words=words, vocab=vocab: likely_words(*a, count=words, vocab_size=vocab))(
                hidden, kernel, after
            )
            pieces, mass = pieces_of(said), 1 - float(jnp.exp(said.target.log_tail).mean())
            for dtype in ROUNDINGS:
                with tempfile.TemporaryDirectory() as folder:
                    numbers = measure(pieces, dtype, vocab, student, Path(folder))
                found.append({'teacher': name, 'vocab': vocab, 'words': words, 'mass': mass, 'dtype': dtype, **numbers})
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=16384)
    parser.add_argument('--json', action='store_true')
    given = parser.parse_args()
    table = rows(given.tokens)
    print(machine())
    print('| vocabulary | words | mass | dtype | bytes/token | plain bytes | write us | read us | moved | gradient |')
    print('| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |')
    for row in table:
        plain = row['words'] * (4 + 4) + 8  # 32-bit ids and values
        print(
            f'| {row["vocab"]:,} | {row["words"]} | {row["mass"]:.3f} | {row["dtype"]} | {row["bytes"]:.0f} | {plain} '
            f'| {row["write_us"]:.0f} | {row["read_us"]:.0f} | {row["moved"]:.1e} | {row["gradient"]:.1e} |'
        )
    if given.json:
        print(json.dumps({'machine': machine(), 'rows': table}))


if __name__ == '__main__':
    main()
