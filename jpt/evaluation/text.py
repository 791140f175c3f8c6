"""Batches that calibrate a model and measure it, and its loss on them."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from jpt.data.batch import Batch, empty_batch
from jpt.data.config import DataConfig, TextConfig
from jpt.data.pipeline import make_pipeline
from jpt.evaluation.score import score
from jpt.model import Model


def batches_from(model: Model, text: TextConfig) -> tuple[list[Batch], list[Batch]]:
    """Batches [B, T] to calibrate with and to measure on, as the model reads them.

    Raises:
        ValueError: no tokenizer, a length that the model has no positions for; and what `make_pipeline` raises.
    """
    tokenizer, longest = model.tokenizer, model.config.max_length
    if tokenizer is None:
        raise ValueError('the model has no tokenizer, so texts cannot be read')
    length = text.length or min(longest, 1024)
    if model.config.learned_positions and length > longest:
        raise ValueError(f"length={length}: expected at most the model's {longest} positions")

    def drawn(data: DataConfig) -> list[Batch]:
        size = min(text.batch_size, text.rows)
        pipeline = make_pipeline(data, tokenizer, batch_size=size, seq_len=length, seed=text.seed, num_epochs=1)
        try:
            batches = list(itertools.islice(pipeline, -(-text.rows // size)))
        finally:
            pipeline.close()
        if len(batches) * size > text.rows:
            batches[-1] = _first_rows(batches[-1], text.rows % size)
        return batches

    calibration = drawn(text.calibration)
    return calibration, calibration if text.held_out == text.calibration else drawn(text.held_out)


def _first_rows(batch: Batch, count: int) -> Batch:
    """A batch without the rows after the first so many, which are empty instead."""
    fresh = empty_batch(*batch.tokens.shape)
    for old, new in zip(jax.tree.leaves(batch), jax.tree.leaves(fresh), strict=True):
        new[:count] = old[:count]
    return fresh


def mean_loss(model: Model, batches: Sequence[Batch]) -> float:
    """Cross-entropy of a model, in nats per predicted token."""
    total = count = 0.0
    for batch in batches:
        scores = score(model.config, model.params, batch, compute=model.compute)
        total -= float(np.sum(np.asarray(scores.log_prob, np.float64) * batch.loss_mask))
        count += float(batch.loss_mask.sum())
    return total / count
