"""Floating-point operations per token of a model, and model FLOPs utilization (MFU).

A product of a token with a kernel of n elements takes 2 n operations forward, 2 n for the gradient of its input and 2 n
for that of the kernel. Scores and weighted values of a layer take 4 q v, where q = heads * head_dim and v is the mean
number of keys that a token sees, counted causally: for a text of L tokens the area under the mask, L^2 / 2, or
w L - w^2 / 2 where a window w is shorter; their backward pass takes twice that. Looking up embeddings, norms,
activations, softmax and recomputation (remat) count nothing. With everything trained this is the count of Megatron-LM,

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
    kinds = list(cfg.layer_kinds())
    head = cfg.vocab_size * cfg.width
    kernels = [_kernel_elements(cfg, kind) for kind in kinds]
    scores = [4 * cfg.num_heads * cfg.head_dim * _keys_seen(lengths, kind.window) for kind in kinds]
    forward = 2 * (sum(kernels) + head) + sum(scores)
    if trained is None:
        return Flops(forward, 3 * forward)
    found = _trained(cfg, trained)
    above = range(found.lowest_layer, len(kinds))
    inputs = sum(2 * kernels[layer] + 2 * scores[layer] for layer in above) + 2 * head * found.below_head
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

    kernels: int
    lora: int
    lowest_layer: int
    below_head: bool


def _trained(cfg: ModelConfig, tree: Any) -> _Trained:
    kernels = lora = 0
    lowest, below_head = cfg.num_layers, False
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = path_of(keys)
        if matches('**/kernel/{a,b}', path):
            lora += leaf.size
        elif matches('**/kernel', path) or (cfg.tied and path == 'embed/embedding'):
            kernels += leaf.size
        below_head |= not path.startswith('lm_head')
        if matches('{embed,positions}', path):
            lowest = 0
        elif matches('layers', path):
            segment, kind = path.split('/')[1].split('.')
            lowest = min(lowest, cfg.layer_index(int(segment), int(kind), 0))
    return _Trained(kernels, lora, lowest, below_head)


def _kernel_elements(cfg: ModelConfig, kind: LayerKind) -> int:
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    return cfg.width * (2 * queries + 2 * keys + (3 if cfg.gated_mlp else 2) * kind.mlp_width)


def _keys_seen(lengths: Sequence[int], window: int | None) -> float:
    """The mean over tokens of the keys that each sees."""
    areas = (
        length * length / 2 if window is None or window >= length else window * length - window * window / 2
        for length in lengths
    )
    return sum(areas) / sum(lengths)
