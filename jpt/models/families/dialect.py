"""The names that a family of models gives its tensors in safetensors files."""

import dataclasses
from collections.abc import Mapping

from jpt.models.cache import CACHE_SCALES


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a module's parameters lie in a layer of a checkpoint.

    `name` stands between the layer's number and `.weight` or `.bias`. `{e}` in it is an expert's number: then every
    expert has a tensor of its own, else all of them lie in one, along its first axis. `transposed`: kernels are stored
    (in, out). `beside`: the modules that share the tensor, this one among them, one after the other along its output
    dimension; or row by row in turns, where `interleaved`.
    """

    name: str
    transposed: bool = False
    beside: tuple[str, ...] = ()
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The names that a family gives its tensors.

    `layer` says for every module of a layer (`attn.q`) where it lies, or for a single parameter (`mlp.router.bias`)
    under which name, without a suffix.
    """

    embed: str
    layer_prefix: str  # before the layer's number
    layer: Mapping[str, str | Stored]
    final_norm: str
    positions: str = ''
    ends: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further modules outside the layers
    mtp: Mapping[str, str | Stored] = dataclasses.field(default_factory=dict)  # as `layer`, of an MTP module around its
    mtp_embed: str = ''  # the embeddings once more, in such a module
    mtp_head: str = ''  # and the head
    head: str = 'lm_head'  # where its table is not the embeddings
    untied: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of `ends`, what lies elsewhere then
    older: tuple[tuple[str, str], ...] = ()  # patterns of names in older files, and what is written in their place
    # Names of one tensor where the head is tied to the embeddings, and of two, one of them unused, where it is not.
    twins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ends_of(self, tied: bool) -> dict[str, str]:
        """Every module outside the layers that has a name of its own."""
        return {'final_norm': self.final_norm, **self.ends, **({} if tied else self.untied)}

    def place(self, module: str, leaf: str, family: str) -> Stored:
        """The full name within a layer, and the rest, of one parameter; `family` is for the error.

        Scales of keys and values stand in the module of attention; layouts of quantized weights have other places too.

        Raises:
            ValueError: the family has no name for it.
        """
        if leaf in CACHE_SCALES:
            out = self.layer['attn.out']
            above, _, _ = (out if isinstance(out, str) else out.name).rpartition('.')
            return Stored(f'{above}.{leaf}')
        exact = self.layer.get(f'{module}.{leaf}')
        entry = self.layer.get(module) if exact is None else exact
        if entry is None:
            raise ValueError(
                f'{family} has no tensor name for the parameter {module}.{leaf}: expected one of the modules '
                f'{", ".join(self.layer)}'
            )
        stored = Stored(entry) if isinstance(entry, str) else entry
        suffix = '' if exact is not None else '.bias' if leaf == 'bias' else '.weight'
        return dataclasses.replace(stored, name=stored.name + suffix, transposed=stored.transposed and leaf == 'kernel')
