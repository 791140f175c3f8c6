"""A jpt model as a model of EleutherAI's lm-evaluation-harness, where that is installed (pip install lm-eval)."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from jpt.evaluation.perplexity import Score
from jpt.evaluation.windows import batches_of, windows


def require_harness() -> None:
    """Raises ValueError where lm-eval is not installed."""
    if importlib.util.find_spec('lm_eval') is None:
        raise ValueError('the adapter needs the package lm-eval, which is not installed: pip install lm-eval')


def pair_ids(encode: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the context's; spaces at its end go to the continuation."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = encode(stripped + continuation)
    start = len(encode(stripped)) if stripped else 0
    return whole, min(start, len(whole) - 1)


def log_likelihoods(
    score: Score, pairs: Sequence[tuple[list[int], int]], *, batch_size: int, length: int
) -> list[tuple[float, bool]]:
    """Summed log-probability of the continuation in each pair, and whether greedy decoding would give it.

    A pair that is longer than `length` loses context from the front.
    """
    rows = []
    for number, (ids, start) in enumerate(pairs):
        cut = max(0, len(ids) - length - 1)
        rows.append((number, np.asarray(ids[cut:], np.int32), max(start - cut - 1, 0)))
    total, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    for batch, owner in batches_of(rows, batch_size, length):
        scores = score(batch)
        sums = np.sum(np.asarray(scores.log_prob, np.float64) * batch.loss_mask, axis=1)
        hits = np.all((np.asarray(scores.greedy) == 1) | (batch.loss_mask == 0), axis=1)
        for row, number in enumerate(owner):
            if number >= 0:
                total[number], greedy[number] = sums[row], hits[row]
    return [(float(value), bool(hit)) for value, hit in zip(total, greedy, strict=True)]


def make_adapter(model: Any, score: Score, *, batch_size: int = 8, length: int = 1024) -> Any:
    """An `lm_eval.api.model.LM` around a loaded jpt model; pass it to `lm_eval.simple_evaluate(model=...)`.

    Raises:
        ValueError: lm-eval is not installed.
    """
    require_harness()
    from lm_eval.api.model import LM

    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, bos=model.tokenizer.adds_bos)

    class Adapter(LM):
        """The three requests of the harness."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [pair_ids(encode, *request.args) for request in requests]
            return log_likelihoods(score, pairs, batch_size=batch_size, length=length)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            totals = []
            for request in requests:
                rows = [(0, piece, skipped) for piece, skipped in windows(encode(request.args[0]), length, 0)]
                totals.append(
                    sum(
                        float(np.sum(np.asarray(score(batch).log_prob, np.float64) * batch.loss_mask))
                        for batch, _ in batches_of(rows, batch_size, length)
                    )
                )
            return totals

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts = []
            for request in requests:
                prompt, options = request.args
                result = model.generate(
                    [prompt],
                    max_new_tokens=int(options.get('max_gen_toks', 256)),
                    temperature=float(options.get('temperature', 0.0)) if options.get('do_sample') else 0.0,
                    stop=tuple(options.get('until', ())),
                )
                texts.append(result[0].text)
            return texts

    return Adapter()
