"""Floating-point operations per token of a model, and model FLOPs utilization (MFU).

A product of a token with a kernel of n elements takes 2 n operations forward, 2 n for the gradient of its input and 2 n
for that of the kernel. What has no kernel is done twice as often backward as forward. Of a layer these count:

- attention: maps, and 2 (q + u) v for scores and weighted values, where q = heads * head_dim, u = heads * width of a
  value, and v is the mean number of keys that a token sees, counted causally: for a text of L tokens the area under the
  mask, L^2 / 2, or w L - w^2 / 2 where a window w is shorter; of a text in chunks, those of its chunks;
- latent attention: the same, with the maps to and from the latents; keys and values of all heads are made;
- Mamba: maps, convolution (one weight per channel and tap), and 4 i z for the scan as the recurrence that it computes:
  every one of i inner channels enters and reads z numbers of state. Its decay is elementwise and counts nothing, as
  softmax does; Megatron-LM takes 7 i z for the scan and nothing for the convolution. What a scan in chunks multiplies
  on top counts nothing, like recomputation;
- modules that predict further tokens: a layer, the map that joins what it reads, and the head once more;
- experts: the router, the kernels of the `per_token` experts that a token goes to, the maps around them, and the MLP
  that all tokens share. Of a kernel [experts, out, in] a token so meets per_token / experts of the elements.

Looking up embeddings, norms, activations, softmax, weighing experts and recomputation (remat) count nothing. With
everything trained this is the count of Megatron-LM, for a dense model

    6 sum(kernels) + 6 width vocab + 6 layers q sum(L^2) / sum(L).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jpt.models.config import LayerKind, ModelConfig
from jpt.quant.paths import matches, path_of

# Dense bfloat16 operations per second, from the vendors' data sheets; the first name within `device_kind` counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ('B200', 2250e12),
    ('GH200', 989.4e12),
    ('H200', 989.4e12),
    ('H100 PCIe', 756e12),
    ('H100', 989.4e12),
    ('A100', 312e12),
    ('L40S', 362e12),
)


class Flops(NamedTuple):
    """Operations per token: of a forward pass, and of a training step (forward and backward)."""

    forward: float
    training: float


def flops_per_token(cfg: ModelConfig, lengths: int | Sequence[int], trained: Any = None) -> Flops:
    """Operations per token for texts of these lengths (packed or not; the sequence length if texts fill it).

    `trained` is the tree of trainable leaves (arrays or shapes, None where frozen), None for all. Frozen kernels need
    no gradient; nothing flows back below the lowest layer that is trained. LoRA factors are found in `trained`.
    """
    lengths = [lengths] if isinstance(lengths, int) else lengths
    kinds = [*cfg.layer_kinds(), *cfg.mtp]
    heads = cfg.vocab_size * cfg.width * (1 + len(cfg.mtp))
    kernels = [_kernel_elements(cfg, kind) for kind in kinds]
    for module in range(cfg.num_layers, len(kinds)):
        kernels[module] += 2 * cfg.width * cfg.width  # what joins hidden state and embedding
    scores = [_mixing(cfg, kind, lengths) for kind in kinds]
    forward = 2 * (sum(kernels) + heads) + sum(scores)
    if trained is None:
        return Flops(forward, 3 * forward)
    found = _trained(cfg, trained)
    above = range(found.lowest_layer, len(kinds))
    inputs = sum(2 * kernels[layer] + 2 * scores[layer] for layer in above) + 2 * heads * found.below_head
    forward += 2 * found.lora
    return Flops(forward, forward + inputs + 2 * found.kernels + 4 * found.lora)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device, None where it is not in the table (a CPU)."""
    return next((peak for name, peak in PEAKS if name in device_kind), None)


def mfu(flops: float, tokens_per_second: float, devices: int, device_kind: str) -> float | None:
    """Operations of the model per second and device, as a share of the bfloat16 peak; None without a known peak."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops * tokens_per_second / devices / peak


class _Trained(NamedTuple):
    """What of a model is trained: elements of kernels and LoRA factors, the lowest layer, anything below the head."""

    kernels: float  # of experts, what one token meets
    lora: float
    lowest_layer: int
    below_head: bool


def _trained(cfg: ModelConfig, tree: Any) -> _Trained:
    kernels = lora = 0.0
    share = 0.0 if cfg.experts is None else cfg.experts.per_token / cfg.experts.count
    lowest, below_head = cfg.num_layers, False
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = path_of(keys).removesuffix('/weight')  # of a kernel that is trained through its rounding
        met = leaf.size * (share if matches('**/experts', path) else 1)
        if path == 'lm_head/kernel' or path == 'embed/embedding':
            met *= 1 + len(cfg.mtp)
        if matches('**/kernel/{a,b}', path):
            lora += met * (1 + len(cfg.mtp) if path.startswith('lm_head') else 1)
        elif matches('**/{kernel,filter}', path) or (cfg.tied and path == 'embed/embedding'):
            kernels += met
        below_head |= not path.startswith('lm_head')
        if matches('{embed,positions}', path):
            lowest = 0
        elif matches('layers', path):
            segment, kind = path.split('/')[1].split('.')
            lowest = min(lowest, cfg.layer_index(int(segment), int(kind), 0))
    return _Trained(kernels, lora, lowest, below_head)


def _kernel_elements(cfg: ModelConfig, kind: LayerKind) -> int:
    """Elements of the kernels of a layer that one token is multiplied with."""
    mixers = {'attention': _attention_elements, 'mamba': _mamba_elements, 'none': lambda cfg: 0}
    return mixers[kind.mixer](cfg) + _mlp_elements(cfg, kind)


def _attention_elements(cfg: ModelConfig) -> int:
    queries, latent = cfg.num_heads * cfg.head_dim, cfg.latent
    if latent is None:
        return cfg.width * 2 * (queries + cfg.num_kv_heads * cfg.head_dim)
    rank, values = latent.query_rank, cfg.num_heads * latent.value_dim
    to_queries = cfg.width * queries if rank is None else rank * (cfg.width + queries)
    to_keys = latent.rank * (cfg.num_heads * latent.nope_dim + values)
    return to_queries + cfg.width * (latent.rank + latent.rope_dim) + to_keys + values * cfg.width


def _mamba_elements(cfg: ModelConfig) -> int:
    space = cfg.state_space
    assert space is not None
    convolved = space.width + 2 * space.groups * space.state_dim
    return cfg.width * (2 * space.width + convolved + space.num_heads) + space.conv_width * convolved


def _mlp_elements(cfg: ModelConfig, kind: LayerKind) -> int:
    maps, experts = 3 if cfg.gated_mlp else 2, cfg.experts
    if not kind.experts:
        return maps * cfg.width * kind.mlp_width
    assert experts is not None
    outer = experts.latent_width or cfg.width
    around = 0 if experts.latent_width is None else 2 * cfg.width * outer
    chosen = maps * outer * experts.width * experts.per_token
    return experts.count * cfg.width + around + chosen + maps * cfg.width * experts.shared_width


def _mixing(cfg: ModelConfig, kind: LayerKind, lengths: Sequence[int]) -> float:
    """Operations per token of what mixes tokens: scores and weighted values, or a scan."""
    if kind.mixer == 'none':
        return 0.0
    if kind.mixer == 'mamba':
        assert cfg.state_space is not None
        return 4 * cfg.state_space.width * cfg.state_space.state_dim
    value_dim = cfg.head_dim if cfg.latent is None else cfg.latent.value_dim
    return 2 * cfg.num_heads * (cfg.head_dim + value_dim) * _keys_seen(lengths, kind.window, kind.chunk)


def _keys_seen(lengths: Sequence[int], window: int | None, chunk: int | None) -> float:
    """The mean over tokens of the keys that each sees."""

    def area(length: int) -> float:
        if chunk is not None and chunk < length:
            whole, rest = divmod(length, chunk)
            return whole * area(chunk) + area(rest)
        if window is None or window >= length:
            return length * length / 2
        return window * length - window * window / 2

    return sum(map(area, lengths)) / sum(lengths)
