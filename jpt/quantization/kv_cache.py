"""Keys and values in eight bits: scales from the largest that calibration has seen, or a plain cast."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jpt.kernels.low_precision import E4M3_MAX, LEAST
from jpt.model import Model
from jpt.models.cache import init_cache
from jpt.models.calibration import Calibration
from jpt.models.config import ModelConfig
from jpt.quant.statistics import LARGEST
from jpt.quantization.settings import KVCache


class CacheTensor(NamedTuple):
    """The keys or the values of one layer; of latent attention, the latents."""

    layer: int  # number in the network
    name: str  # 'k' or 'v'
    amax: float  # largest absolute value in calibration
    scale: float

    @property
    def beyond(self) -> bool:
        """Whether values of that size are clipped."""
        return self.amax > E4M3_MAX * self.scale * (1 + 2.0**-20)  # more than a scale's own rounding


class CacheReport(NamedTuple):
    """What a cache in eight bits holds."""

    format: KVCache
    tensors: list[CacheTensor]  # those with the largest values first
    bytes: tuple[int, int]  # per token, of the model as it was and of this one


def with_cache(model: Model, how: KVCache, statistics: Calibration) -> tuple[Model, CacheReport]:
    """The model with keys and values in eight bits.

    Args:
        model: as it is.
        how: 'fp8' or 'fp8_cast'.
        statistics: with 'cache', see jpt.models.calibration.

    Raises:
        ValueError: a model without a cache, or keys or values that are not finite.
    """
    cfg = dataclasses.replace(model.config, kv_cache='fp8')
    layers: list[list[Any]] = [list(kinds) for kinds in model.params['layers']]
    tensors: list[CacheTensor] = []
    for segment, kind, name, amax in _largest(statistics):
        scale = _scales(amax) if how == 'fp8' else np.ones(amax.shape, np.float32)
        for repeat, (largest, one) in enumerate(zip(map(float, amax), map(float, scale), strict=True)):
            layer = cfg.layer_index(segment, kind, repeat)
            if not math.isfinite(largest):
                raise ValueError(f'layer {layer}: {name} holds NaN or infinities over the calibration data')
            tensors.append(CacheTensor(layer, name, largest, one))
        params = layers[segment][kind]
        placed = jax.device_put(scale, None if model.mesh is None else NamedSharding(model.mesh, P()))
        layers[segment][kind] = params | {'attn': params['attn'] | {f'{name}_scale': placed}}
    dtype = model.compute.dtype
    sizes = bytes_per_token(model.config, dtype), bytes_per_token(cfg, dtype)
    made = dataclasses.replace(model, config=cfg, params=model.params | {'layers': layers})
    return made, CacheReport(how, sorted(tensors, key=lambda one: (-one.amax, one.layer, one.name)), sizes)


def _largest(statistics: Calibration) -> Iterator[tuple[int, int, str, np.ndarray]]:
    """(segment, kind, 'k' or 'v', largest absolute values [R]) of all that layers keep."""
    for segment, kinds in enumerate(statistics.layers):
        for kind, node in enumerate(kinds):
            for name, found in node.get('attn', {}).get('cache', {}).items():
                yield segment, kind, name, np.asarray(found[LARGEST])


def _scales(amax: np.ndarray) -> np.ndarray:
    """float32(amax) / 448, rounded once; 1 where nothing was kept, or nothing that float32 has normal quotients for."""
    scale = amax.astype(np.float32) / np.float32(E4M3_MAX)
    return np.where(scale >= np.float32(LEAST), scale, np.float32(1))


def bytes_per_token(cfg: ModelConfig, dtype: DTypeLike) -> int:
    """What a cache grows by with every token, in bytes; what does not grow is left out."""

    def size(slots: int) -> int:
        entries = jax.tree.leaves(jax.eval_shape(lambda: init_cache(cfg, 1, slots, dtype)).layers)
        return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)

    return size(2) - size(1)
