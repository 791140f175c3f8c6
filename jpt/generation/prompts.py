"""Prompts as checked token ids, and what the model's own files say about where a text ends."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from jpt.data.tokenizer import Tokenizer
from jpt.models.config import Compute, ModelConfig

Prompts = Sequence[str] | Sequence[Sequence[int]]


class LoadedModel(Protocol):
    """What `generate` reads of a model."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> Any: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def assets(self) -> Path | None: ...
    @property
    def mesh(self) -> Mesh | None: ...
    @property
    def compute(self) -> Compute: ...


def encode_prompts(model: LoadedModel, prompts: Prompts) -> list[list[int]]:
    """The token ids of prompts, checked.

    Raises:
        ValueError: see `generate`.
    """
    if isinstance(prompts, str):
        raise ValueError('prompts is one text: expected a list of texts or of lists of token ids')
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded: list[list[int]] = []
    if texts:
        if model.tokenizer is None:
            raise ValueError('prompts are texts, but the model has no tokenizer: expected lists of token ids')
        encoded = model.tokenizer.encode_batch(texts, bos=model.tokenizer.adds_bos)
    in_turn = iter(encoded)
    result = [next(in_turn) if isinstance(prompt, str) else list(map(int, prompt)) for prompt in prompts]
    for i, row in enumerate(result):
        if not row:
            raise ValueError(f'prompts[{i}] has no tokens: a model needs at least one to begin with')
        if not 0 <= min(row) <= max(row) < model.config.vocab_size:
            wrong = next(token for token in row if not 0 <= token < model.config.vocab_size)
            raise ValueError(f'prompts[{i}] holds id {wrong}: expected ids from 0 to {model.config.vocab_size - 1}')
    return result


def check_lengths(cfg: ModelConfig, prompts: Sequence[Sequence[int]], budgets: Sequence[int]) -> None:
    """Raises ValueError where a prompt and what is to follow it exceed the positions the model is made for.

    Dynamic rotary scaling has no end; published configs that ask for YaRN leave max_length as it was without it.
    """
    stretched = (rope.factor * rope.original_length for rope in cfg.ropes() if rope.kind == 'yarn')
    limit = math.inf if any(rope.kind == 'dynamic' for rope in cfg.ropes()) else max(cfg.max_length, *stretched, 0)
    for i, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        if budget < 1 or budget != int(budget):
            raise ValueError(f'max_new_tokens={budget!r} for prompts[{i}]: expected a positive integer')
        if len(prompt) + budget > limit:
            raise ValueError(
                f'prompts[{i}] has {len(prompt)} tokens, and max_new_tokens is {budget}: '
                f'together at most {int(limit)} (the positions of the model)'
            )


def default_eos_ids(model: LoadedModel) -> tuple[int, ...]:
    """The ids that end a text: eos_token_id of generation_config.json or config.json, else the tokenizer's."""
    for name in ('generation_config.json', 'config.json'):
        path = model.assets / name if model.assets is not None else None
        if path is not None and path.is_file():
            found = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id')
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
    if model.tokenizer is not None and model.tokenizer.eos_id is not None:
        return (model.tokenizer.eos_id,)
    return ()


def text_decoder(model: LoadedModel, needed: bool) -> Callable[[list[int]], str] | None:
    """The model's ids-to-text function; None without a tokenizer, which is an error where text is needed."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        if needed:
            raise ValueError('stop and stream need text, but the model has no tokenizer')
        return None

    def text(ids: list[int]) -> str:
        # An embedding may have more rows than the tokenizer has ids; such an id stands for no text.
        return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size], skip_special=True)

    return text
