"""How parameters and cache lie while tokens are drawn one by one."""

import dataclasses
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jpt.kernels.local import platform
from jpt.models.cache import Cache, KeysValues
from jpt.models.config import ModelConfig, Segment
from jpt.models.transformer import Params, head_kernel
from jpt.quant.dot import Transposed

# A second copy of larger weights costs more memory than a user expects.
MOST_BYTES = 2**30


def wants_own_layout(params: Params, mesh: Mesh | None) -> bool:
    """Whether decoding should have its own copy of the weights: on CPU, where reading them is what takes the time.

    Layer by layer, because a slice of a stack is copied before it is multiplied; and transposed (see `Transposed`).
    """
    count = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return mesh is None and platform() == 'cpu' and count <= MOST_BYTES


def one_by_one(cfg: ModelConfig) -> ModelConfig:
    """The same model with every layer a segment of its own, and a head of its own where it was tied."""
    return dataclasses.replace(cfg, segments=tuple(Segment((kind,), 1) for kind in cfg.layer_kinds()), tied=False)


@partial(jax.jit, static_argnames='cfg')
def decoding_params(cfg: ModelConfig, params: Params) -> Params:
    """The parameters for `one_by_one(cfg)`, kernels transposed."""
    layers = []
    for segment, kinds in zip(cfg.segments, params['layers'], strict=True):
        for repeat in range(segment.repeats):
            # A stack of one, as every segment holds its parameters.
            layers += [[transposed(jax.tree.map(lambda leaf, at=repeat: leaf[at : at + 1], kind))] for kind in kinds]
    return params | {'layers': layers, 'lm_head': transposed({'kernel': head_kernel(cfg, params)})}


def decoding_cache(cfg: ModelConfig, cache: Cache) -> Cache:
    """The cache for `one_by_one(cfg)`; keys and values of a single row are without the batch axis."""
    alone = cache.positions_BS.shape[0] == 1
    layers = []
    for segment, kinds in zip(cfg.segments, cache.layers, strict=True):
        for repeat in range(segment.repeats):
            own = jax.tree.map(lambda x, at=repeat: x[at], kinds) if segment.repeats > 1 else kinds
            layers += [[_alone(entry) if alone else entry] for entry in own]
    return cache._replace(layers=layers)


def _alone(entry: Any) -> Any:
    return KeysValues(entry.keys[0], entry.values[0]) if isinstance(entry, KeysValues) else entry


def transposed(params: Params) -> Params:
    """The tree with every array named `kernel` held the other way round; other weight types and experts' stay."""

    def turn(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [getattr(key, 'key', None) for key in path]
        is_kernel = names[-1] == 'kernel' and not {'experts', 'router'} & set(names)
        return Transposed(leaf.swapaxes(-1, -2)) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(turn, params)
