"""`generate`: a list of prompts in, texts, token ids and log-probabilities out."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpt.generation.decode import Drawn, Program, Request, bucket, decode, prefill
from jpt.generation.layout import decoding_params, wants_own_layout
from jpt.generation.prompts import LoadedModel, Prompts, check_lengths, default_eos_ids, encode_prompts, text_decoder
from jpt.generation.result import Continuation, GenerationResult
from jpt.generation.sampling import SamplingConfig, stack
from jpt.generation.text import StopScanner
from jpt.models.transformer import Params

Stream = Callable[[int, str], None]


def generate(
    model: LoadedModel,
    prompts: Prompts,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    stream: Stream | None = None,
    batch_size: int = 32,
    chunk: int = 16,
) -> list[GenerationResult]:
    """Continues every prompt; the results come in the order of the prompts.

    Prompts are texts (a beginning-of-text token is put before them where the tokenizer does so) or lists of token ids,
    taken as they are. They are run in batches of `batch_size`, longest first. A row gives the same alone and in any
    batch (up to rounding): it has its own settings and seed.

    Args:
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty: one value, or one for each prompt; see
            `SamplingConfig`.
        seed: one for each prompt, or one number n: prompt i then has seed n + i.
        stop: strings; a text ends before the first of them that appears in it.
        eos_ids: ids that end a text; None: those of generation_config.json, else the tokenizer's.
        logprobs: also return the log-probabilities of the new tokens.
        stream: called with (index of the prompt, new text) as texts grow.
        chunk: tokens between two looks at the texts, where `stop` or `stream` asks for any.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a prompt too long for the model, a setting out of
            range, or text where the model has no tokenizer.
    """
    count = len(prompts)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else seed
    samplings = _samplings(
        count,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seeds,
    )
    budgets = _per_prompt('max_new_tokens', max_new_tokens, count)
    ids = encode_prompts(model, prompts)
    check_lengths(model.config, ids, budgets)
    eos = frozenset(default_eos_ids(model) if eos_ids is None else eos_ids)
    live = bool(stop) or stream is not None
    decoder = text_decoder(model, live)
    rows = [
        Continuation(i, ids[i], budgets[i], samplings[i], StopScanner(decoder, ids[i], stop) if decoder else None)
        for i in range(count)
    ]
    own_layout = wants_own_layout(model.params, model.mesh)
    params = decoding_params(model.config, model.params) if own_layout else model.params
    order = sorted(rows, key=lambda row: -len(row.prompt))
    with jax.set_mesh(model.mesh) if model.mesh is not None else contextlib.nullcontext():
        for start in range(0, count, batch_size):
            batch = order[start : start + batch_size]
            for part in _run(model, params, batch, eos, logprobs, chunk if live else None):
                for row, text in part:
                    if stream is not None and text:
                        stream(row.index, text)
    return [row.result(logprobs) for row in rows]


def _samplings(count: int, **settings: Any) -> list[SamplingConfig]:
    columns = {name: _per_prompt(name, value, count) for name, value in settings.items()}
    return [SamplingConfig(**{name: column[i] for name, column in columns.items()}) for i in range(count)]


def _run(
    model: LoadedModel,
    params: Params,
    batch: list[Continuation],
    eos: frozenset[int],
    with_logps: bool,
    chunk: int | None,
) -> Iterator[list[tuple[Continuation, str]]]:
    """Generates for one batch; yields after every chunk what each row can show."""
    padded = bucket(len(batch), least=1)
    settings = [row.sampling for row in batch] + [SamplingConfig()] * (padded - len(batch))
    with_penalty = any(config.repetition_penalty != 1 for config in settings)
    program = Program(model.config, model.compute, with_logps, with_penalty, params is not model.params)
    width = bucket(max(row.budget for row in batch))
    length = bucket(max(len(row.prompt) for row in batch))
    tokens_BT = np.zeros((padded, length), np.int32)
    lengths_B, budget_B = np.ones(padded, np.int32), np.zeros(padded, np.int32)
    for i, row in enumerate(batch):
        tokens_BT[i, : len(row.prompt)] = row.prompt
        lengths_B[i], budget_B[i] = len(row.prompt), row.budget
    request = Request(stack(settings), jnp.asarray(budget_B), jnp.asarray(sorted(eos) or [-1], jnp.int32))
    state, drawn = prefill(program, length + width, model.params, tokens_BT, lengths_B, request)
    yield _taken(batch, drawn, eos)
    while any(row.finish is None for row in batch):
        going_B = np.array([row.finish is None for row in batch] + [False] * (padded - len(batch)))
        state, drawn = decode(program, width, params, request, state, going_B, chunk or width)
        yield _taken(batch, drawn, eos)


def _taken(batch: list[Continuation], drawn: Drawn, eos: frozenset[int]) -> list[tuple[Continuation, str]]:
    tokens, *logps = jax.tree.leaves(jax.device_get(drawn))
    counts = (tokens >= 0).sum(axis=1)
    return [
        (row, row.take(tokens[i, :n].tolist(), [leaf[i, :n].tolist() for leaf in logps], eos))
        for i, (row, n) in enumerate(zip(batch, counts, strict=False))
    ]


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * count
    if len(values) != count:
        raise ValueError(f'{name} has {len(values)} values for {count} prompts: expected one, or one for each prompt')
    return values
