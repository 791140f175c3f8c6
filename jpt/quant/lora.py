"""LoRA on a parameter tree: wrap kernels with low-rank factors, train the factors, merge them into the kernels.

Hu et al. 2021, arXiv:2106.09685; `rank_stabilized` is Kalajdzievski 2023, arXiv:2312.03732. PEFT's directories are read
and written by jpt.checkpoint.peft.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jpt.quant.dot import LoraKernel, Weight, dense, is_weight
from jpt.quant.paths import map_with_path, matches, paths, select

# For jpt.training.freeze.partition: train the factors alone.
FREEZE_ALL_BUT_LORA = ('**', '!**/kernel/{a,b}')


def lora_scale(rank: int, alpha: float, rank_stabilized: bool = False) -> float:
    """The factor on b a: alpha / rank, or alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def add_lora(
    params: Any,
    key: jax.Array,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    rank_stabilized: bool = False,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    place: str = 'lora.targets',
) -> Any:
    """Wraps the layers' kernels that the path patterns `targets` cover, but for experts' and routers'.

    The model computes what it did before.

    a [R, rank, in] is uniform in +-1/sqrt(in), b [R, out, rank] is zero (PEFT's default), both float32. `ranks` and
    `alphas` give other values by path pattern, the first that matches.

    Raises:
        ValueError: a pattern that covers no kernel, a kernel that has an adapter, a rank that is not in
            [1, min(out, in)].
    """
    kernels = [path for path in paths(params, is_weight) if path.startswith('layers/') and path.endswith('/kernel')]
    # Experts' kernels are stacks, which PEFT has no adapters for, and a router is not low-rank to begin with.
    kernels = [path for path in kernels if not {'experts', 'router'} & set(path.split('/'))]
    chosen = select(targets, kernels, place)
    for pattern in (*(ranks or {}), *(alphas or {})):
        select([pattern], sorted(chosen), place)

    shapes: dict[str, _Shape] = {}

    def check(path: str, kernel: Weight) -> None:
        if path in chosen:
            if isinstance(kernel, LoraKernel):
                raise ValueError(f'{place}: {path} has an adapter already: merge it first')
            shapes[path] = _Shape(kernel.shape, _first(ranks, path, rank))
            shapes[path].check(f'{place}: {path}')

    map_with_path(check, params, is_leaf=is_weight)
    factors = jax.jit(_draw, static_argnums=1)(key, tuple(shapes.items()))

    def wrap(path: str, kernel: Weight) -> Weight:
        if path not in chosen:
            return kernel
        scale = lora_scale(shapes[path].rank, _first(alphas, path, alpha), rank_stabilized)
        a, b = factors[path]
        return LoraKernel(kernel, a, b, scale)

    return map_with_path(wrap, params, is_leaf=is_weight)


def merge_lora(params: Any) -> Any:
    """Replaces every adapted kernel by base + scale * b a, in the dtype of the base."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_weight)
    adapted = [isinstance(leaf, LoraKernel) for leaf in leaves]
    merged = iter(_dense_all([leaf for leaf, chosen in zip(leaves, adapted, strict=True) if chosen]))
    return jax.tree.unflatten(
        structure, [next(merged) if chosen else leaf for leaf, chosen in zip(leaves, adapted, strict=True)]
    )


class _Shape(NamedTuple):
    """A kernel [..., out, in] and the rank of its adapter."""

    kernel: tuple[int, ...]
    rank: int

    def check(self, place: str) -> None:
        out, inner = self.kernel[-2:]
        if not 1 <= self.rank <= min(out, inner):
            raise ValueError(f'{place} [{out}, {inner}]: rank={self.rank}: expected 1 to {min(out, inner)}')


def _draw(key: jax.Array, shapes: tuple[tuple[str, _Shape], ...]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The first factors of every adapter, each from a key of its own."""
    drawn = {}
    for path, ((*lead, out, inner), rank) in shapes:
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = inner**-0.5
        a = jax.random.uniform(own_key, (*lead, rank, inner), jnp.float32, -bound, bound)
        drawn[path] = a, jnp.zeros((*lead, out, rank), jnp.float32)
    return drawn


@jax.jit
def _dense_all(kernels: list[LoraKernel]) -> list[jax.Array]:
    return [dense(kernel) for kernel in kernels]


def _first(table: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    return next((value for pattern, value in (table or {}).items() if matches(pattern, path)), default)
