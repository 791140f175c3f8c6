"""`generate`: a list of prompts in, texts, token ids and log-probabilities out."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpt.generation.decode import Drawn, Program, Request, bucket, decode, prefill
from jpt.generation.layout import decoding_params, wants_own_layout
from jpt.generation.placement import rows_over, without_pipeline
from jpt.generation.prompts import LoadedModel, Prompts, check_lengths, default_eos_ids, encode_prompts, text_decoder
from jpt.generation.result import Continuation, GenerationResult
from jpt.generation.sampling import SamplingConfig, stack
from jpt.generation.text import StopScanner
from jpt.models.config import Compute, ModelConfig
from jpt.models.transformer import Params
from jpt.sharding.mesh import use_mesh

Stream = Callable[[int, str], None]


def generate(
    model: LoadedModel,
    prompts: Prompts,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    stop: Sequence[str] = (),
    eos_ids: Sequence[int] | None = None,
    logprobs: bool = False,
    stream: Stream | None = None,
    batch_size: int = 32,
    chunk: int = 16,
    **sampling: Any,
) -> list[GenerationResult]:
    """Continues every prompt; the results come in the order of the prompts.

    Prompts are texts (a beginning-of-text token is put before them where the tokenizer does so) or lists of token ids,
    taken as they are. They are run in batches of `batch_size`, longest first. A row gives the same alone and in any
    batch (up to rounding): it has its own settings and seed.

    Args:
        max_new_tokens: one number, or one for each prompt.
        stop: strings; a text ends before the first of them that appears in it.
        eos_ids: ids that end a text; None: those of generation_config.json, else the tokenizer's.
        logprobs: also return the log-probabilities of the new tokens.
        stream: called with (index of the prompt, new text) as texts grow.
        chunk: tokens between two looks at the texts, where `stop` or `stream` asks for any.
        sampling: temperature (0: greedy), top_k, top_p, min_p, repetition_penalty, seed: one value, or one for each
            prompt; see `SamplingConfig`. From a single seed n, prompt i gets seed n + i.

    Raises:
        ValueError: an encoder, an empty prompt, an id outside the vocabulary, a prompt too long for the model, a
            setting out of range, or text where the model has no tokenizer.
        FloatingPointError: the model's logits are not numbers.
    """
    if not model.config.causal:
        raise ValueError(f'{model.config.family} is an encoder: expected a model that predicts text')
    live = bool(stop) or stream is not None
    decoder = text_decoder(model, live)
    ids = encode_prompts(model, prompts)
    budgets = _per_prompt('max_new_tokens', max_new_tokens, len(ids))
    check_lengths(model.config, ids, budgets)
    configs = _sampling_configs(sampling, len(ids))
    rows = [
        Continuation(i, ids[i], budgets[i], configs[i], StopScanner(decoder, ids[i], stop) if decoder else None)
        for i in range(len(ids))
    ]
    eos = frozenset(default_eos_ids(model) if eos_ids is None else eos_ids)
    order = sorted(rows, key=lambda row: -len(row.prompt))
    with _ready(model) as ready:
        for start in range(0, len(rows), batch_size):
            for part in _run(ready, order[start : start + batch_size], eos, logprobs, chunk if live else None):
                for row, text in part:
                    if stream is not None and text:
                        stream(row.index, text)
    return [row.result(logprobs) for row in rows]


def _sampling_configs(settings: dict[str, Any], count: int) -> list[SamplingConfig]:
    known = SamplingConfig.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise TypeError(f'generate got an unknown setting {name!r}: expected one of {", ".join(known)}')
    seed = settings.get('seed', 0)
    # The first seed is checked before it is wrapped around.
    seeds = [(SamplingConfig(seed=seed).seed + i) % 2**32 for i in range(count)] if isinstance(seed, int) else seed
    columns = {name: _per_prompt(name, value, count) for name, value in {**settings, 'seed': seeds}.items()}
    return [SamplingConfig(**{name: column[i] for name, column in columns.items()}) for i in range(count)]


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * count
    if len(values) != count:
        raise ValueError(f'{name} has {len(values)} values for {count} prompts: expected one, or one for each prompt')
    return values


class _Ready(NamedTuple):
    """A model placed for generation."""

    cfg: ModelConfig
    compute: Compute
    params: Params  # for reading prompts
    decoding_params: Params
    own_layout: bool
    rows_over: int


@contextlib.contextmanager
def _ready(model: LoadedModel) -> Iterator[_Ready]:
    """The model placed for generation, its mesh set."""
    params, mesh = without_pipeline(model.config, model.params, model.mesh)
    own_layout = wants_own_layout(params, mesh)
    with use_mesh(mesh):
        turned = decoding_params(model.config, params) if own_layout else params
        yield _Ready(model.config, model.compute, params, turned, own_layout, rows_over(mesh))


def _run(
    ready: _Ready, batch: list[Continuation], eos: frozenset[int], with_logps: bool, chunk: int | None
) -> Iterator[list[tuple[Continuation, str]]]:
    """Generates for one batch; yields after every chunk what each row can show."""
    padded = ready.rows_over * bucket(-(-len(batch) // ready.rows_over), least=1)
    settings = [row.sampling for row in batch] + [SamplingConfig()] * (padded - len(batch))
    with_penalty = any(config.repetition_penalty != 1 for config in settings)
    program = Program(ready.cfg, ready.compute, with_logps, with_penalty, ready.own_layout)
    width = bucket(max(row.budget for row in batch))
    length = bucket(max(len(row.prompt) for row in batch))
    tokens_BT = np.zeros((padded, length), np.int32)
    lengths_B, budget_B = np.ones(padded, np.int32), np.zeros(padded, np.int32)
    for i, row in enumerate(batch):
        tokens_BT[i, : len(row.prompt)] = row.prompt
        lengths_B[i], budget_B[i] = len(row.prompt), row.budget
    eos_E = np.full(bucket(len(eos), least=8), -1, np.int32)
    eos_E[: len(eos)] = sorted(eos)
    request = Request(stack(settings), jnp.asarray(budget_B), jnp.asarray(eos_E))
    state, drawn = prefill(program, length + width, ready.params, tokens_BT, lengths_B, request)
    yield _taken(batch, drawn, eos, ready.cfg.vocab_size)
    while any(row.finish is None for row in batch):
        going_B = np.array([row.finish is None for row in batch] + [False] * (padded - len(batch)))
        state, drawn = decode(program, width, ready.decoding_params, request, state, going_B, chunk or width)
        yield _taken(batch, drawn, eos, ready.cfg.vocab_size)


def _taken(
    batch: list[Continuation], drawn: Drawn, eos: frozenset[int], vocab_size: int
) -> list[tuple[Continuation, str]]:
    tokens, *logps = jax.tree.leaves(jax.device_get(drawn))
    if tokens.max() >= vocab_size:  # where the largest of the logits is not a number, none of them equals it
        row = batch[int(tokens.max(axis=1).argmax())]
        raise FloatingPointError(f'prompts[{row.index}]: the logits of the model are not numbers')
    counts = (tokens >= 0).sum(axis=1)
    return [
        (row, row.take(tokens[i, :n].tolist(), [leaf[i, :n].tolist() for leaf in logps], eos))
        for i, (row, n) in enumerate(zip(batch, counts, strict=False))
    ]
