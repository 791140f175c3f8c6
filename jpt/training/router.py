"""What a step does with the load of a model's experts: a metric, and the correction that evens it out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpt.models.config import ModelConfig
from jpt.models.names import get
from jpt.sharding.layout import Layout, to_device_layout

Sums = dict[str, Any]


def split_load(sums: Sums) -> tuple[Sums, jax.Array | None]:
    """The metrics with 'load' [L, E] made into 'max_load', and the load; as they are for a model without experts.

    'max_load' is the mean over layers of the tokens of the busiest expert, in units of an even share.
    """
    if 'load' not in sums:
        return sums, None
    load_LE = sums['load'][0]
    total_L = jnp.sum(load_LE, axis=-1)
    worst_L = jnp.max(load_LE, axis=-1) * load_LE.shape[-1] / jnp.where(total_L > 0, total_L, 1)
    rest = {name: pair for name, pair in sums.items() if name != 'load'}
    return rest | {'max_load': (jnp.sum(worst_L), jnp.sum(total_L > 0, dtype=worst_L.dtype))}, load_LE


def make_correction(cfg: ModelConfig, layout: Layout, rate: float) -> Callable[[Any, jax.Array], Any]:
    """A function (params, load [L, E]) -> params that moves the router's corrections towards an even load.

    An expert with less than the mean load of its layer gains `rate`, one with more loses it (Wang et al. 2024,
    arXiv:2408.15664, algorithm 1). Frozen corrections (None) stay.
    """

    def corrected(params: Any, load_LE: jax.Array) -> Any:
        """The parameters with the corrections of all layers moved by the load of their experts."""
        mean = jnp.mean(load_LE, axis=-1, keepdims=True)
        moves_LE = rate * jnp.sign(mean - load_LE)
        path = ('mlp', 'router', 'correction')
        layers = [list(kinds) for kinds in params['layers']]
        for segment, part in enumerate(cfg.segments):
            for kind, layer in enumerate(part.kinds):
                if not layer.experts or _find(layers[segment][kind], path) is None:
                    continue
                rows = jnp.asarray([cfg.layer_index(segment, kind, repeat) for repeat in range(part.repeats)])
                where = ('layers', segment, kind, *path)
                moves = get(to_device_layout(layout, _nested(where, moves_LE[rows])), where)
                layers[segment][kind] = _moved(layers[segment][kind], path, moves)
        moved = {'layers': layers}
        if cfg.mtp:
            own = zip(params['mtp'], moves_LE[cfg.num_layers :], strict=True)
            inner = ('layer', *path)
            moved['mtp'] = [part if _find(part, inner) is None else _moved(part, inner, moves) for part, moves in own]
        return params | moved

    return corrected


def _find(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _nested(path: tuple[Any, ...], leaf: Any) -> Any:
    """A tree of dicts with one leaf; list indices become dict keys, which is all that a layout looks at."""
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf


def _moved(tree: Any, path: tuple[str, ...], moves: jax.Array) -> Any:
    if not path:
        return tree + moves.astype(tree.dtype)
    return tree | {path[0]: _moved(tree[path[0]], path[1:], moves)}
