"""A weight as it is with a quantized form beside it, to learn what the one would cost in place of the other.

Products are those of the weight, or where `on` says so those of the other. Backward, the gradient of `score` is no
gradient: it is what the other would change of this layer's output, weighed by the gradient of what is differentiated.
So one backward pass has it for all layers, stacked and scanned as they are. Where shards of `tensor` have parts of an
expert's inputs, their outputs and changes add up: what is squared is the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import axis_size, psum
from jpt.kernels.local_products import TENSOR
from jpt.quant.alike import Alike
from jpt.quant.products import plain_product, quantized_dot, quantized_grouped_dot
from jpt.quant.tensors import Array, QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tried(Alike):
    """A weight [..., out, in] and what is tried in its place.

    on: [] or [R] of a stack, bool: compute with `other`.
    score: likewise, float32, of any value. Its gradient is the sum over rows and outputs of (dy (y' - y))^2, where y is
        the output, y' that of `other` for the same input, and dy the gradient of y.
    inputs: how many the whole weight has; where `base` has fewer, it is one shard's part of `tensor`.
    """

    base: Array
    other: QTensor
    on: Array
    score: Array
    inputs: int = dataclasses.field(metadata={'static': True})

    @property
    def _like(self) -> Any:
        return self.base

    def local_specs(self, spec: P, sizes: Mapping[str, int], name: str) -> Tried:
        """How it lies for a product on shards alone; see `QTensor.local_specs`, which raises likewise."""
        other = self.other.local_specs(spec, sizes, name)
        parts: dict[str, Any] = {'base': spec, 'other': other, 'on': P(), 'score': P()}
        return dataclasses.replace(self, **parts)


def _as_it_is(x: jax.Array, base: Array, sizes_E: jax.Array | None) -> jax.Array:
    return plain_product(x, jnp.asarray(base).astype(x.dtype), sizes_E)


def _instead(x: jax.Array, other: QTensor, sizes_E: jax.Array | None) -> jax.Array:
    return quantized_dot(x, other) if sizes_E is None else quantized_grouped_dot(x, other, sizes_E)


@jax.custom_vjp
def tried_dot(x: jax.Array, kernel: Tried, sizes_E: jax.Array | None = None) -> jax.Array:
    """x [..., in] times a kernel [out, in]; with `sizes_E` rows by group, see `dot.grouped_dot`."""
    return jax.lax.cond(
        kernel.on, lambda: _instead(x, kernel.other, sizes_E), lambda: _as_it_is(x, kernel.base, sizes_E)
    )


def _forward(x: jax.Array, kernel: Tried, sizes_E: jax.Array | None = None) -> tuple[jax.Array, Any]:
    return tried_dot(x, kernel, sizes_E), (x, kernel, sizes_E)


def _backward(residuals: Any, dy: jax.Array) -> tuple[jax.Array, Any, None]:
    """The gradient of x through the weight as it is, and what stands for that of the score."""
    x, kernel, sizes_E = residuals
    y, pull = jax.vjp(lambda x: _as_it_is(x, kernel.base, sizes_E), x)
    over = [TENSOR] if kernel.inputs > kernel.shape[-1] else []
    changed = psum((_instead(x, kernel.other, sizes_E) - y).astype(jnp.float32), over)
    # All shards of a sum have the same score, and theirs are added up.
    score = jnp.sum(jnp.square(dy.astype(jnp.float32) * changed)) / axis_size(over)
    return pull(dy)[0], dataclasses.replace(kernel, base=None, other=None, on=None, score=score), None


tried_dot.defvjp(_forward, _backward)
