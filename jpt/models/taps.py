"""Taps: hidden states of a model by the names of what they are, in slots [B, T, D] that ride through its layers.

| name | hidden states |
| --- | --- |
| embed.output | what enters the first layer |
| layers.N.input | the residual stream before layer N, which is counted from 0 |
| layers.N.output | the residual stream behind layer N, before the final norm |
| layers.N.attention | what the mixer of layer N (attention, latent attention or Mamba) adds to the residual stream |
| final_norm.output | what the unembedding reads |

A mixer's part is taken behind its output map and its bias, behind the post-norm where the model has one, and before it
is added: the norm of an encoder, which is of the sum, is not in it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jpt.models.config import ModelConfig

EMBEDDED, NORMED = 'embed.output', 'final_norm.output'
Slots = dict[str, jax.Array]


class Passed(NamedTuple):
    """The hidden states [B, T, D] around a layer, by the last words of their names."""

    input: jax.Array
    output: jax.Array
    attention: jax.Array | None  # None of a layer without a mixer


def check_taps(cfg: ModelConfig, taps: Iterable[str], place: str = 'taps') -> None:
    """Raises ValueError where a tap is not the name of a hidden state of this model; `place` says where it stands."""
    kinds = list(cfg.layer_kinds())
    for name in taps:
        found = re.fullmatch(r'layers\.(0|[1-9][0-9]*)\.(input|output|attention)', name)
        if name not in (EMBEDDED, NORMED) and (found is None or int(found[1]) >= len(kinds)):
            raise ValueError(
                f"{place}: {name!r}: expected '{EMBEDDED}', '{NORMED}' or 'layers.N.input', 'layers.N.output', "
                f"'layers.N.attention' with N from 0 to {len(kinds) - 1}"
            )
        if found is not None and found[2] == 'attention' and kinds[int(found[1])].mixer == 'none':
            mixing = [str(number) for number, kind in enumerate(kinds) if kind.mixer != 'none']
            raise ValueError(f'{place}: {name!r}: layer {found[1]} mixes no tokens: expected N of {", ".join(mixing)}')


def layer_taps(taps: Iterable[str], first: int, end: int) -> list[str]:
    """Those of the names that layers `first` to `end` - 1 fill."""
    return [name for name in taps if name.startswith('layers.') and first <= _parts(name)[0] < end]


def empty_slots(taps: Iterable[str], hidden_BTD: jax.Array) -> Slots:
    """Zeros for every tap."""
    return {name: jnp.zeros_like(hidden_BTD) for name in taps}


def filled(slots: Mapping[str, jax.Array], layer: jax.Array | int, passed: Passed) -> Slots:
    """The slots of layers' taps behind a layer, whose number may be traced: it fills its own and leaves the others."""
    after = dict(slots)
    for name, slot in slots.items():
        number, word = _parts(name)
        value = getattr(passed, word)
        if value is not None:
            after[name] = jnp.where(number == layer, value.astype(slot.dtype), slot)
    return after


def _parts(name: str) -> tuple[int, str]:
    _, number, word = name.split('.')
    return int(number), word
