"""What an entry of the lists of golden models is, and how both dialects of a config are spelled."""

import dataclasses
from typing import Any

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One golden model.

    Attributes:
        name: directory under tests/golden/models.
        model_class: class of transformers.
        config: arguments of that class's config.
        probes: config changes of which each must move the logits by a hundred tolerances.
        close_probes: changes that move them less, but by five tolerances (exact GELU against its tanh form).
        legacy: edits that turn config.json into the older dialect: DROP takes the key away. None: no such file.
        eos: which generated token of the first prompt becomes the end-of-sequence token (None: generation never ends).
        max_shard_size: as of save_pretrained, to force several safetensors files.
        alone: lengths of rows that are also run alone (rotary scaling that depends on the length).
        cached: whether greedy text is made with transformers' cache (not where its decoding step computes another
            function than its full forward pass).
    """

    name: str
    model_class: str
    config: Json
    probes: tuple[Json, ...] = ()
    legacy: Json | None = None
    eos: int | None = None
    max_shard_size: str = '1GB'
    alone: tuple[int, ...] = ()
    close_probes: tuple[Json, ...] = ()
    cached: bool = True


def rope(theta: float, **scaling: Any) -> Json:
    """The newer spelling: one dictionary that holds the base and the scaling."""
    return {'rope_type': 'default', 'rope_theta': theta, **scaling}


DROP = '(drop)'
# What every legacy config lacks or has instead.
OLD = {'dtype': DROP, 'rope_parameters': DROP, 'torch_dtype': 'float32'}


def old(**changes: Any) -> Json:
    """Edits to the older dialect, and those of the family on top."""
    return {**OLD, **changes}
