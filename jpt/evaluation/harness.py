"""A jpt model as a model of EleutherAI's lm-evaluation-harness, where that is installed (pip install lm-eval)."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jpt.evaluation.perplexity import Score
from jpt.evaluation.windows import batches_of

Encode = Callable[[str], list[int]]
SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'seed')


def require_harness() -> None:
    """Raises ValueError where lm-eval is not installed."""
    if importlib.util.find_spec('lm_eval') is None:
        raise ValueError('the adapter needs the package lm-eval, which is not installed: pip install lm-eval')


def pair_ids(encode: Encode, prefix: int, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the context's; spaces at its end go to the continuation.

    Without a context the continuation follows the token `prefix`, as after nothing at all it could not be predicted.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = encode(stripped + continuation)
    if not stripped:
        whole = whole if whole[:1] == [prefix] else [prefix, *whole]
        return whole, 1
    return whole, min(len(encode(stripped)), len(whole) - 1)


def rolling_pieces(ids: Sequence[int], prefix: int, length: int) -> list[tuple[np.ndarray, int]]:
    """A text after `prefix`, in pieces of at most length + 1 tokens, and how many targets of each are context only.

    Every token of the text is predicted once; the last piece reaches back as far as it can, as the harness asks.
    """
    whole = np.asarray([prefix, *(ids[1:] if list(ids[:1]) == [prefix] else ids)], np.int32)
    pieces = []
    for done in range(0, len(whole) - 1, length):
        end = min(done + length + 1, len(whole))
        start = max(0, end - length - 1)
        pieces.append((whole[start:end], done - start))
    return pieces


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
    total, greedy = _sums(score, rows, len(pairs), batch_size, length)
    return [(float(value), bool(hit)) for value, hit in zip(total, greedy, strict=True)]


def _sums(
    score: Score, rows: Sequence[tuple[int, np.ndarray, int]], count: int, batch_size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each of `count` texts the summed log-probability, and whether every target was the likeliest token."""
    total, greedy = np.zeros(count), np.ones(count, bool)
    for batch, owner in batches_of(rows, batch_size, length):
        scores = score(batch)
        sums = np.sum(np.asarray(scores.log_prob, np.float64) * batch.loss_mask, axis=1)
        hits = np.all((np.asarray(scores.greedy) == 1) | (batch.loss_mask == 0), axis=1)
        for row, number in enumerate(owner):
            if number >= 0:
                total[number] += sums[row]
                greedy[number] &= hits[row]
    return total, greedy


def make_adapter(model: Any, score: Score, *, batch_size: int = 8, length: int = 1024) -> Any:
    """An `lm_eval.api.model.LM` around a loaded jpt model; pass it to `lm_eval.simple_evaluate(model=...)`.

    Raises:
        ValueError: lm-eval is not installed.
    """
    require_harness()
    from lm_eval.api.model import LM

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError('the model has no tokenizer, so the texts of the harness cannot be scored')
    prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.required_id('eos_token')
    length = min(length, model.config.max_length)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)

    class Adapter(LM):
        """The three requests of the harness, and its chat templates."""

        tokenizer_name = tokenizer.source

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            pairs = [pair_ids(encode, prefix, *request.args) for request in requests]
            return log_likelihoods(score, pairs, batch_size=batch_size, length=length)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            texts = [rolling_pieces(encode(request.args[0]), prefix, length) for request in requests]
            rows = [(number, piece, skipped) for number, text in enumerate(texts) for piece, skipped in text]
            return _sums(score, rows, len(texts), batch_size, length)[0].tolist()

        def generate_until(self, requests: list[Any]) -> list[str]:
            return generate_until(model, encode, [request.args for request in requests], batch_size, length)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            template = tokenizer.chat_template()
            return template.render(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            name = chat_template if isinstance(chat_template, str) else 'default'
            return tokenizer.chat_template(name).source if chat_template else ''

    return Adapter()


def generate_until(
    model: Any, encode: Encode, requests: Sequence[tuple[str, dict[str, Any]]], batch_size: int, length: int
) -> list[str]:
    """Continues contexts with the harness's options; a context that does not fit loses tokens from the front.

    Raises:
        ValueError: an option that is not known here, by its name.
    """
    texts = [''] * len(requests)
    groups: dict[str, list[int]] = {}  # requests of equal options are one batch
    for number, (_, options) in enumerate(requests):
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(number)
    for key, numbers in groups.items():
        options = {name: value for name, value in json.loads(key).items() if value is not None}
        until = options.pop('until', None) or ()
        count = int(options.pop('max_gen_toks', options.pop('max_new_tokens', 256)))
        sampled = options.pop('do_sample', options.get('temperature', 0) > 0)
        sampling = {name: options.pop(name) for name in SAMPLING if name in options}
        if options:
            raise ValueError(f'generate_until: {sorted(options)}: expected until, max_gen_toks, do_sample, {SAMPLING}')
        sampling = {'temperature': 1.0} | sampling if sampled else {'temperature': 0.0}  # 1, as transformers has it
        room = max(length - count, 1)
        prompts = [encode(requests[number][0])[-room:] for number in numbers]
        stop = (until,) if isinstance(until, str) else tuple(until)
        results = model.generate(
            prompts, max_new_tokens=min(count, length - 1), stop=stop, batch_size=batch_size, **sampling
        )
        for number, result in zip(numbers, results, strict=True):
            texts[number] = result.text
    return texts
