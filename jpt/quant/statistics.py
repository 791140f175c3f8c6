"""What linear layers are given over calibration data: sums and maxima over real tokens, by channel.

A layer is watched where the collection 'calibration' is mutable and a `Watch` is in the collection 'watch' of the
whole module that is applied; elsewhere none of this is in the program. What was measured becomes the variable 'input'
in the place of the layer's weights, and 'output' where another weight was tried. Inputs are measured multiplied by the
'input_factor' that the collection 'factors' has for the layer. None of it depends on how tokens are batched.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpt.quant.dot import dot
from jpt.quant.histogram import counts_of
from jpt.quant.producers import Deferred, dense_of

CALIBRATION = 'calibration'
WATCH = 'watch'
COMPARED = 'compared'  # a collection of other weights, in the places of the module's own
FACTORS = 'factors'  # a collection of what inputs are multiplied by before they are measured, in the same places
SUMS: dict[str, Callable[[jax.Array], jax.Array]] = {'absolute': jnp.abs, 'square': jnp.square}
LARGEST = 'largest'  # |x|
HISTOGRAM = 'histogram'  # of |x| over all channels, see jpt/quant/histogram.py
STATISTICS = (*SUMS, LARGEST, HISTOGRAM)


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

    def largest(self, values_BT: jax.Array) -> jax.Array:
        """The largest over tokens that count of values [B, T, ...] of at least 0; 0 where none counts."""
        weights = self.weights_BT.reshape(self.weights_BT.shape + (1,) * (values_BT.ndim - 2))
        return jnp.max(jnp.where(weights > 0, values_BT, 0), axis=(0, 1))

    def measure(self, x_BTI: jax.Array) -> dict[str, jax.Array]:
        """The statistics [I] of a layer's input, at least float32, and the histogram [BINS], int32.

        Raises:
            ValueError: the input is not of the tokens that are weighed.
        """
        if x_BTI.ndim != 3 or x_BTI.shape[:2] != self.weights_BT.shape:
            raise ValueError(f'input of shape {x_BTI.shape}: expected [B, T, in] with [B, T] = {self.weights_BT.shape}')
        wide_BTI = x_BTI.astype(jnp.promote_types(x_BTI.dtype, jnp.float32))
        found = {name: self.total(SUMS[name](wide_BTI)) for name in self.statistics if name in SUMS}
        if LARGEST in self.statistics:
            found[LARGEST] = self.largest(jnp.abs(wide_BTI))
        if HISTOGRAM in self.statistics:
            found[HISTOGRAM] = counts_of(wide_BTI, self.weights_BT > 0)
        return found

    def compare(self, y_BTO: jax.Array, other_BTO: jax.Array) -> dict[str, jax.Array]:
        """The squares of a layer's output, and of its difference to another, summed over tokens and channels."""
        wide, other = (y.astype(jnp.promote_types(y.dtype, jnp.float32)) for y in (y_BTO, other_BTO))
        return {
            'signal': jnp.sum(self.total(jnp.square(wide))),
            'noise': jnp.sum(self.total(jnp.square(wide - other))),
        }


def watch_of(module: nn.Module) -> Watch | None:
    """What is to be measured of a module that is being applied; None where nothing is."""
    if module.is_initializing() or not module.is_mutable_collection(CALIBRATION) or module.scope is None:
        return None
    return module.scope.root.get_variable(WATCH, 'tokens')


def observe(module: nn.Module, given_BTI: jax.Array | Deferred, y_BTO: jax.Array) -> None:
    """Measures the input of a linear layer that is being applied, where it is watched.

    Where the collection 'compared' has another weight for it, its output with that weight is compared with `y_BTO`.
    """
    watch = watch_of(module)
    if watch is not None:
        read_BTI = x_BTI = dense_of(given_BTI)
        if module.has_variable(FACTORS, 'input_factor'):
            factor: jax.Array = module.get_variable(FACTORS, 'input_factor')
            read_BTI = x_BTI * factor.reshape(1, 1, -1).astype(x_BTI.dtype)
        module.put_variable(CALIBRATION, 'input', watch.measure(read_BTI))
        if module.has_variable(COMPARED, 'kernel'):
            other_BTO = dot(given_BTI, module.get_variable(COMPARED, 'kernel'))
            module.put_variable(CALIBRATION, 'output', watch.compare(y_BTO, other_BTO))
