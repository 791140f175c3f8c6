"""Which tensor of a Hugging Face directory is which of its model: older names, copies, and what is left out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jpt.checkpoint.safetensors import TensorSpec
from jpt.checkpoint.tree import listing
from jpt.models.config import ModelConfig
from jpt.models.families import FAMILIES
from jpt.models.names import leaves

# Buffers that older versions of transformers stored and recomputed: rotary frequencies, causal masks, positions.
RECOMPUTED = re.compile(r'(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|embeddings\.position_ids)')


class LeftOut(NamedTuple):
    """Tensors below one prefix that belong to no part of the model that jpt computes."""

    tensors: int
    bytes: int


def current_names(stored: Iterable[str], rules: Sequence[tuple[str, str]], place: str) -> dict[str, str]:
    """Maps today's name of every tensor to its name in the files, by patterns and what replaces them.

    Raises:
        ValueError: two tensors that have the same name today.
    """
    names: dict[str, str] = {}
    for name in stored:
        current = name
        for pattern, replacement in rules:
            current = re.sub(pattern, replacement, current)
        if current in names:
            raise ValueError(f'{place}: {names[current]} and {name} are two names, an older and a newer, of one tensor')
        names[current] = name
    return names


def without_parts(
    found: Mapping[str, TensorSpec], prefixes: Sequence[str]
) -> tuple[dict[str, TensorSpec], dict[str, LeftOut]]:
    """The tensors below none of the prefixes, and what there is below each."""
    kept: dict[str, TensorSpec] = {}
    left_out: dict[str, LeftOut] = {}
    for name, spec in found.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            kept[name] = spec
        else:
            before = left_out.get(prefix, LeftOut(0, 0))
            left_out[prefix] = LeftOut(before.tensors + 1, before.bytes + spec.nbytes)
    return kept, left_out


def is_beyond(cfg: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to a layer behind the model's last one: of a module that predicts further tokens."""
    number = re.search(r'(?:^|\.)layers\.(\d+)\.', name)
    return number is not None and int(number[1]) >= cfg.num_layers


def copies(cfg: ModelConfig) -> dict[str, str]:
    """Names under which a checkpoint may hold a tensor of the model once more or instead: of the copy -> of the tensor.

    A tied head is a copy of the embeddings; an MTP module may hold both once more.
    """
    dialect = FAMILIES[cfg.family].dialect
    names = {copy: source.name for leaf in leaves(cfg) for source in leaf.sources for copy in source.copies}
    if cfg.tied:
        return names | {f'{dialect.head}.weight': f'{dialect.embed}.weight'} | {b: a for a, b in dialect.twins.items()}
    return names | dict(dialect.twins)


def may_differ(cfg: ModelConfig) -> frozenset[str]:
    """Those of `copies` that nothing reads: twins where the head is not tied."""
    return frozenset(() if cfg.tied else FAMILIES[cfg.family].dialect.twins)


def resolve_names(
    cfg: ModelConfig,
    found: Mapping[str, TensorSpec],
    place: str,
    wanted: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Maps the name of every tensor of the model to the one of those found, which may lack the model's prefix.

    wanted: the shapes of the model's tensors by name.

    Raises:
        ValueError: names every missing, wrongly shaped and unexpected tensor.
    """
    prefix = leaves(cfg)[0].sources[0].name.split('.')[0] + '.'
    bare = not any(name.startswith(prefix) for name in found)  # saved from the model without its head, as GPT-2 was
    names = {name: name.removeprefix(prefix) if bare else name for name in wanted}
    twice = {copy.removeprefix(prefix) if bare else copy: name for copy, name in copies(cfg).items()}
    for copy, name in twice.items():
        if names[name] not in found and copy in found:
            names[name] = copy
    lines = []
    for name, shape in wanted.items():
        if names[name] not in found:
            lines.append(f'{name}: missing, expected {list(shape)}')
        elif found[names[name]].shape != shape:
            lines.append(f'{name}: has shape {list(found[names[name]].shape)}, expected {list(shape)}')
    known = {*names.values(), *twice}
    extra = [name for name in found if name not in known and not RECOMPUTED.fullmatch(name)]
    lines += [f'{name}: unexpected, {found[name].dtype}{list(found[name].shape)}' for name in extra]
    if lines:
        hint = '; it looks quantized, which is not read' if any('scale' in name for name in extra) else ''
        raise ValueError(
            f'{place}: not the tensors of the {cfg.family} model in config.json{hint}:\n  {listing(lines)}'
        )
    return names
