"""What inputs of a linear layer are multiplied by, channel by channel, and its weight divided by, before both are
rounded: numbers that are hard to round move from the one to the other.

The formulas are those of SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, equation 4) and of AWQ (Lin et al. 2023,
arXiv:2306.00978, section 3.2), in the form that ModelOpt gives them. They take weights that read the same input
together, as rows of one matrix, and give them one factor, so that it can be made part of what stands before them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpt.quant.formats import Format
from jpt.quant.tensors import Array, block_amax, spread

LEAST, MOST = 1e-4, 1e4  # of a factor
DEAD = 2.0**-31  # an input that is never larger than this
TINY = float(np.finfo(np.float32).tiny)
EXPONENTS = tuple(round(0.1 * n, 1) for n in range(11))  # of AWQ's grid


def smoothquant_factor(inputs: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """weights^(1 - alpha) / inputs^alpha of every channel [..., in], float32 between 1e-4 and 1e4.

    Args:
        inputs: the largest |x| of every channel.
        weights: the largest |w| of every column, over all weights that read this input.
        alpha: 1 moves all differences between channels into the weights, 0 all of the weights' into the inputs.

    A channel that is dead, in the inputs or in all weights, keeps 1.
    """
    x, w = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    alive = (x > DEAD) & (w > 0)
    x, w = np.where(alive, x, 1), np.where(alive, w, 1)
    return np.where(alive, np.clip(w ** (1 - alpha) / x**alpha, LEAST, MOST), 1).astype(np.float32)


def awq_factor(inputs: np.ndarray, weights: np.ndarray, exponent: float) -> np.ndarray:
    """1 / s of every channel [..., in], float32, where s = inputs^a / weights^(1 - a), clipped to 1e-4 and 1e4, over
    the geometric mean of its largest and its least.

    Args:
        inputs: the mean |x| of every channel; where all are 0, which is where nothing was read, the factor is 1.
        weights: the mean over rows of |w| over the largest of its block, see `column_share`.
        exponent: a, from 0 to 1, to be searched for: the one with the least error of the output.
    """
    x, w = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    s = np.clip(x**exponent / (w ** (1 - exponent) + TINY), LEAST, MOST)
    s = s / np.sqrt(s.max(axis=-1, keepdims=True) * s.min(axis=-1, keepdims=True))
    return np.where(x.max(axis=-1, keepdims=True) > 0, 1 / s, 1).astype(np.float32)


def joint_amax(weights: Sequence[Array]) -> np.ndarray:
    """The largest |w| of every column [..., in] of weights [..., out, in] that read the same input."""
    return np.max([np.asarray(_column_amax(weight), np.float64) for weight in weights], axis=0)


def joint_share(weights: Sequence[Array], forms: Sequence[Format]) -> np.ndarray:
    """The mean of `column_share` [..., in] over the rows of all weights [..., out, in] that read the same input."""
    shares = [np.asarray(_column_share(weight, form), np.float64) for weight, form in zip(weights, forms, strict=True)]
    return np.average(shares, axis=0, weights=[weight.shape[-2] for weight in weights])


@jax.jit
def _column_amax(weight: Array) -> jax.Array:
    return jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=-2)


def column_share(weight: Array, form: Format) -> jax.Array:
    """The mean over rows of |w| over the largest of its block, [..., in] float32."""
    wide = jnp.abs(jnp.asarray(weight).astype(jnp.float32))
    return jnp.mean(wide / (spread(block_amax(wide, form), wide.shape, form) + TINY), axis=-2)


_column_share = jax.jit(column_share, static_argnums=1)
