"""Perplexity of a model on texts, per token and per byte, and agreement with a reference model.

Definition. A text is tokenized whole (after the beginning-of-text token where the tokenizer adds one) and cut into
windows of `length` tokens, each beginning with `context` tokens of the one before. Every token but the first of a text
is predicted exactly once, from the tokens before it in its window. Perplexity per token is exp of the mean negative
log-likelihood over these tokens; bits per byte is their summed negative log-likelihood in bits, divided by the UTF-8
bytes of the texts, which compares models of different vocabularies.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jpt.data.batch import Batch
from jpt.evaluation.score import Scores
from jpt.evaluation.windows import batches_of, rows_of

Score = Callable[[Batch], Scores]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Sums over all predicted tokens; `kl` and `agreement` are nan without a reference."""

    texts: int
    tokens: int
    bytes: int
    loss: float  # nats per token
    perplexity: float  # per token
    bits_per_byte: float
    accuracy: float  # share of tokens that were the likeliest
    kl: float  # KL(reference || model), nats per token
    agreement: float  # share of tokens where both models have the same likeliest token


def perplexity(
    score: Score,
    texts: Iterable[Sequence[int]],
    num_bytes: int,
    *,
    batch_size: int,
    length: int,
    context: int = 0,
    has_reference: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Perplexity:
    """Scores texts given as token ids; `num_bytes` is the length of all of them in UTF-8.

    Raises:
        ValueError: no text has two tokens.
    """
    sums = np.zeros(4, np.float64)
    tokens, seen = 0, -1
    for batch, owner in batches_of(rows_of(texts, length, context), batch_size, length):
        scores = score(batch)
        mask = np.asarray(batch.loss_mask, np.float64)
        # numpy's float64 sums: a float32 sum over millions of tokens loses digits.
        sums += [np.sum(np.asarray(part, np.float64) * mask) for part in scores]
        tokens += int(mask.sum())
        seen = max(seen, int(owner.max()))
        progress(tokens)
    if not tokens:
        raise ValueError('no text has two tokens or more, so there is nothing to predict')
    log_prob, greedy, kl, agreement = (sums / tokens).tolist()
    nothing = math.nan
    return Perplexity(
        texts=seen + 1,
        tokens=tokens,
        bytes=num_bytes,
        loss=-log_prob,
        perplexity=math.exp(-log_prob) if -log_prob < 700 else math.inf,
        bits_per_byte=-log_prob * tokens / math.log(2) / num_bytes,
        accuracy=greedy,
        kl=kl if has_reference else nothing,
        agreement=agreement if has_reference else nothing,
    )
