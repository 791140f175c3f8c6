"""What linear layers are given over calibration data: sums over real tokens, by channel.

A layer is watched where the collection 'calibration' is mutable and a `Watch` is in the collection 'watch' of the
whole module that is applied; elsewhere none of this is in the program. What was measured becomes the variable 'input'
in the place of the layer's weights. Sums over tokens do not depend on how tokens are batched.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

CALIBRATION = 'calibration'
WATCH = 'watch'
STATISTICS: dict[str, Callable[[jax.Array], jax.Array]] = {'absolute': jnp.abs, 'square': jnp.square}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """What is measured, and how much each token counts: weights_BT is 0 for padding, and 1 or any weight elsewhere.

    Raises:
        ValueError: a statistic that is none of STATISTICS.
    """

    weights_BT: jax.Array
    statistics: tuple[str, ...] = dataclasses.field(metadata={'static': True})

    def __post_init__(self) -> None:
        for name in self.statistics:
            if name not in STATISTICS:
                raise ValueError(f'statistics: {name!r}: expected some of {", ".join(STATISTICS)}')

    def total(self, values_BT: jax.Array) -> jax.Array:
        """The weighted sum over tokens of values [B, T, ...], which may be anything where the weight is 0."""
        weights = self.weights_BT.astype(values_BT.dtype)
        weights = weights.reshape(weights.shape + (1,) * (values_BT.ndim - 2))
        return jnp.sum(jnp.where(weights > 0, values_BT * weights, 0), axis=(0, 1))

    def measure(self, x_BTI: jax.Array) -> dict[str, jax.Array]:
        """The statistics [I] of a layer's input, at least float32.

        Raises:
            ValueError: the input is not of the tokens that are weighed.
        """
        if x_BTI.ndim != 3 or x_BTI.shape[:2] != self.weights_BT.shape:
            raise ValueError(f'input of shape {x_BTI.shape}: expected [B, T, in] with [B, T] = {self.weights_BT.shape}')
        wide_BTI = x_BTI.astype(jnp.promote_types(x_BTI.dtype, jnp.float32))
        return {name: self.total(STATISTICS[name](wide_BTI)) for name in self.statistics}


def observe(module: nn.Module, x_BTI: jax.Array) -> None:
    """Measures the input of a module that is being applied, where it is watched."""
    if module.is_initializing() or not module.is_mutable_collection(CALIBRATION) or module.scope is None:
        return
    watch = module.scope.root.get_variable(WATCH, 'tokens')
    if watch is not None:
        module.put_variable(CALIBRATION, 'input', watch.measure(x_BTI))
