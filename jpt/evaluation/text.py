"""Windows of text that calibrate a model and measure its loss."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jpt.data.batch import Batch
from jpt.data.sources import open_source
from jpt.evaluation.samples import sampled_rows
from jpt.evaluation.score import score
from jpt.evaluation.windows import batches_of
from jpt.model import Model


@dataclasses.dataclass(frozen=True)
class Text:
    """What calibrates and measures.

    Attributes:
        data: a source of texts, as `jpt.data.sources.open_source` takes it.
        held_out: likewise, for the losses; None: the calibration windows.
        rows: windows drawn of each.
        length: tokens of a window; 0: the model's own length, 1024 at most.
    """

    data: str
    held_out: str | None = None
    rows: int = 128
    length: int = 0
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (('rows', 1), ('batch_size', 1), ('length', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'--{name}={getattr(self, name)}: expected {least} or more')


def batches_from(model: Model, text: Text) -> tuple[list[Batch], list[Batch]]:
    """Batches [B, T] of windows to calibrate with and to measure the loss on.

    Raises:
        ValueError: no tokenizer, or a length that the model has no positions for.
    """
    tokenizer, longest = model.tokenizer, model.config.max_length
    if tokenizer is None:
        raise ValueError('the model has no tokenizer, so texts cannot be read')
    length = text.length or min(longest, 1024)
    if model.config.learned_positions and length > longest:
        raise ValueError(f"length={length}: expected at most the model's {longest} positions")

    def encode(string: str) -> Sequence[int]:
        return tokenizer.encode(string, bos=tokenizer.adds_bos)

    def drawn(path: str) -> list[Batch]:
        rows = sampled_rows(open_source(path), encode, text.rows, length, text.seed)
        return [batch for batch, _ in batches_of(rows, min(text.batch_size, len(rows)), length)]

    calibration = drawn(text.data)
    return calibration, calibration if text.held_out is None else drawn(text.held_out)


def mean_loss(model: Model, batches: Sequence[Batch]) -> float:
    """Cross-entropy of a model, in nats per predicted token."""
    total = count = 0.0
    for batch in batches:
        scores = score(model.config, model.params, batch, compute=model.compute)
        total -= float(np.sum(np.asarray(scores.log_prob, np.float64) * batch.loss_mask))
        count += float(batch.loss_mask.sum())
    return total / count
