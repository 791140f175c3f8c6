"""What fixes a model's computation (`ModelConfig`) and how it is run (`Compute`); both frozen and hashable.

Layers are described as segments: a segment is a period of layer kinds, repeated. A dense model is one segment of
period 1; Gemma 3 is a segment of period 6 and one for the remainder; DeepSeek-V3, which starts with dense layers and
goes on with experts, is two segments.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

RopeKind = Literal['default', 'linear', 'dynamic', 'yarn', 'llama3']
LONGEST_PERIOD = 16
Activation = Literal['silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', 'tanh']


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f'{type(config).__name__}.{name}={getattr(config, name)}: expected a positive integer')


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and how it is stretched beyond the length it was trained on."""

    theta: float = 10_000.0
    kind: RopeKind = 'default'
    factor: float = 1.0
    original_length: int = 0  # positions seen before stretching; unused by 'default' and 'linear'
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None derives it from the next two
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    interleaved: bool = False  # the two dimensions of a pair are neighbours, not half a head apart


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP: how experts are chosen for a token, and how their outputs are weighed.

    The router's scores are a softmax or sigmoid of its logits. The `per_token` experts with the highest scores are
    chosen; with `corrected`, the highest scores plus a bias per expert, which is not learnt by gradients and weighs
    nothing (DeepSeek-V3, section 2.1.2). With `groups`, only experts of the `top_groups` groups may be chosen whose two
    best sum highest. An expert's output is weighed by its score, `normalized` to a sum of 1 over the chosen, times
    `scale`.
    """

    count: int
    per_token: int
    width: int  # of one expert's MLP
    scoring: Literal['softmax', 'sigmoid'] = 'softmax'
    normalized: bool = True
    scale: float = 1.0
    corrected: bool = False
    groups: int = 1
    top_groups: int = 1
    on_input: bool = False  # what an expert reads is weighed, not what it returns
    biases: bool = False  # of the router and of the experts' maps
    shared_width: int = 0  # of an MLP that all tokens pass through as well; 0: none
    latent_width: int | None = None  # experts work between two maps to and from this width; None: on the model's
    capacity: float | None = None  # in even shares of a device's tokens, what an expert takes; None: all
    router_aux_loss_coef: float = 0.0  # the field of config.json, only kept: a job weighs its own losses

    def __post_init__(self) -> None:
        _require_positive(self, 'count', 'width', 'groups', 'top_groups')
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f'Experts.per_token={self.per_token}: expected 1 to count={self.count}')
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f'Experts.capacity={self.capacity}: expected a positive number or None')
        if self.count % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f'Experts.groups={self.groups}, top_groups={self.top_groups}: expected a divisor of '
                f'count={self.count}, and at most that many'
            )
        if self.per_token > self.count // self.groups * self.top_groups:
            raise ValueError(
                f'Experts.per_token={self.per_token}: top_groups={self.top_groups} of {self.groups} groups hold '
                f'{self.count // self.groups * self.top_groups} experts'
            )


@dataclasses.dataclass(frozen=True)
class ClampedGate:
    """gpt-oss's gated unit: (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit`, up within +-limit."""

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are made from a latent of `rank`.

    A head's query and key have `nope_dim` dimensions without rotary embedding and `rope_dim` with it, whose key all
    heads share; its value has `value_dim`. Queries are made from a latent too where `query_rank` is given.
    """

    rank: int
    query_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6  # of the norms of both latents

    def __post_init__(self) -> None:
        _require_positive(self, 'rank', 'nope_dim', 'rope_dim', 'value_dim')
        if self.query_rank is not None and self.query_rank < 1:
            raise ValueError(f'Latent.query_rank={self.query_rank}: expected a positive integer or None')


@dataclasses.dataclass(frozen=True)
class StateSpace:
    """The state space of Mamba-2's mixer (Dao and Gu 2024): `num_heads` heads of `head_dim`, each with a state.

    What enters a state and what reads it is shared by the heads of a group, and has `state_dim` numbers.
    """

    num_heads: int
    head_dim: int
    groups: int
    state_dim: int
    conv_width: int
    activation: Activation = 'silu'
    bias: bool = False  # of the linear maps
    conv_bias: bool = True
    steps: tuple[float, float] = (0.0, math.inf)  # limits of the step size

    def __post_init__(self) -> None:
        _require_positive(self, 'num_heads', 'head_dim', 'groups', 'state_dim', 'conv_width')
        if self.num_heads % self.groups:
            raise ValueError(f'StateSpace.groups={self.groups}: expected a divisor of num_heads={self.num_heads}')

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What a bidirectional encoder has beside its layers: kinds of tokens, and a head on its first token."""

    token_types: int
    pooled: bool


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Queries grow with their position, by 1 + scale * log(1 + floor((position + 1) / floor)) (Llama 4)."""

    scale: float
    floor: float


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What one layer computes, where layers of a model differ: a mixer of tokens, then an MLP or experts."""

    rope: Rope | None = None  # None: no rotary embedding
    window: int | None = None  # a query sees the keys at distance < window
    mlp_width: int = 0  # of a dense MLP; 0: experts or nothing
    attention_scale: float | None = None  # the factor on this layer's attention scores; None: the model's
    chunk: int | None = None  # a query sees the keys whose position // chunk is its own
    unit_qk: bool = False  # queries and keys are divided by their root mean square, after the rotary embedding
    temperature: Temperature | None = None
    experts: bool = False  # a mixture of experts in place of the MLP
    mixer: Literal['attention', 'mamba', 'none'] = 'attention'


@dataclasses.dataclass(frozen=True)
class Segment:
    """A period of layer kinds and how often it repeats; its layers are numbered period by period."""

    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        return len(self.kinds) * self.repeats


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the computation of a transformer: a decoder, or an encoder where it is not causal."""

    family: str  # the Hugging Face model_type, which names tensors and config fields
    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    segments: tuple[Segment, ...]
    max_length: int  # positions the model was trained for
    activation: Activation = 'silu'
    gated_mlp: bool = True
    clamped_gate: ClampedGate | None = None  # in place of activation(gate) * up
    norm: Literal['rms', 'layer'] = 'rms'
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma multiplies by (1 + scale)
    pre_norms: bool = True  # what attention and MLP read is normalized
    post_norms: bool = False  # what attention and MLP return is normalized
    residual_norms: bool = False  # the residual stream itself is normalized after each, and not at the end
    qk_norm: bool = False
    qk_norm_over_heads: bool = False  # over all heads together instead of each
    qkv_bias: bool = False
    attention_out_bias: bool = False
    sinks: bool = False  # a logit per head that joins the softmax's denominator only
    mlp_bias: bool = False
    experts: Experts | None = None  # of the layers whose kind has them
    latent: Latent | None = None  # attention is latent where it is given
    state_space: StateSpace | None = None  # of the layers whose mixer is Mamba's
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embed_scale: float | None = None
    learned_positions: bool = False
    causal: bool = True  # a token sees no later ones
    encoder: Encoder | None = None
    mtp: tuple[LayerKind, ...] = ()  # the layers of modules that predict further tokens, see models/mtp.py
    tied: bool = False
    # How keys and values are kept, and rounded wherever they are attended: 'fp8' is E4M3 with a scale for all keys of a
    # layer and one for all values, which are parameters of it. Those of `mtp` are as computed.
    kv_cache: Literal['as_computed', 'fp8'] = 'as_computed'

    def __post_init__(self) -> None:
        _require_positive(self, 'vocab_size', 'width', 'num_heads', 'num_kv_heads', 'head_dim', 'max_length')
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f'ModelConfig.num_kv_heads={self.num_kv_heads}: expected a divisor of num_heads={self.num_heads}'
            )
        if self.rotary_dim % 2 and any(kind.rope for kind in self.layer_kinds()):
            raise ValueError(f'ModelConfig.head_dim={self.rotary_dim}: rotary embedding needs an even head dimension')
        if not self.segments or self.num_layers < 1:
            raise ValueError('ModelConfig.segments: expected at least one layer')
        if any(kind.experts for kind in self.layer_kinds()) != (self.experts is not None):
            raise ValueError('ModelConfig.experts: expected where, and only where, some layers have experts')
        if any(kind.mixer == 'mamba' for kind in self.layer_kinds()) != (self.state_space is not None):
            raise ValueError('ModelConfig.state_space: expected where, and only where, some layers are Mamba layers')
        self._check_kv_cache()

    def _check_kv_cache(self) -> None:
        if self.kv_cache not in ('as_computed', 'fp8'):
            raise ValueError(f"ModelConfig.kv_cache={self.kv_cache!r}: expected 'as_computed' or 'fp8'")
        keeps = self.causal and any(kind.mixer == 'attention' for kind in self.layer_kinds())
        if self.kv_cache == 'fp8' and not keeps:
            raise ValueError(
                f"ModelConfig.kv_cache='fp8': {self.family} keeps no keys and values: expected 'as_computed'"
            )

    @property
    def num_layers(self) -> int:
        return sum(segment.num_layers for segment in self.segments)

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head the rotary embedding turns."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def scale(self) -> float:
        """The factor on attention scores, where a layer kind has none of its own."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def layer_kinds(self) -> Iterator[LayerKind]:
        """The kinds of all layers, in order."""
        for segment in self.segments:
            for _ in range(segment.repeats):
                yield from segment.kinds

    def layer_index(self, segment: int, kind: int, repeat: int) -> int:
        """The number of a layer in the whole model, from its place in the segments."""
        before = sum(s.num_layers for s in self.segments[:segment])
        return before + repeat * len(self.segments[segment].kinds) + kind

    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotary embeddings, in order of first use."""
        kinds = (*self.layer_kinds(), *self.mtp)
        return tuple(dict.fromkeys(kind.rope for kind in kinds if kind.rope is not None))


def runs_of(kinds: tuple[LayerKind, ...]) -> tuple[Segment, ...]:
    """Segments for a list of layers, such that the fewest layers are traced and compiled, then the fewest segments.

    A segment costs the layers of its period, of which there are up to LONGEST_PERIOD, however often it repeats.
    """
    # best[i]: (layers traced, segments) for the layers from i on.
    best: list[tuple[int, tuple[Segment, ...]]] = [(0, ())] * (len(kinds) + 1)
    for first in reversed(range(len(kinds))):
        options = []
        for period in range(1, min(LONGEST_PERIOD, len(kinds) - first) + 1):
            block, repeats = kinds[first : first + period], 1
            while True:
                end = first + period * repeats
                traced, rest = best[end]
                options.append((period + traced, 1 + len(rest), -repeats, (Segment(block, repeats), *rest)))
                if kinds[end : end + period] != block:
                    break
                repeats += 1
        traced, _, _, segments = min(options, key=lambda option: option[:3])
        best[first] = traced, segments
    return best[0][1]


def unplaced(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The placement of activations on a single device: none."""
    del axes
    return x


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is run; nothing here changes what is computed, up to rounding.

    remat: 'none' keeps the operands of products and the inputs of norms and activations, 'full' each layer's input
    only, 'dots' the results of matrix products; 'save:a,b' keeps what is named (see `block.NAMES`), 'offload:a,b' keeps
    it in host memory.
    """

    dtype: DTypeLike = 'float32'
    remat: str = 'none'
    attention: Literal['auto', 'blockwise', 'dense', 'cudnn'] = 'auto'
    unroll: int = 1  # layers per iteration of the scan
    exchange: Literal['padded', 'ragged'] = 'padded'  # how tokens travel to experts on other devices
    place: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = unplaced
