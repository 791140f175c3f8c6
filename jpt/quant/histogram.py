"""A histogram of |x| with a bin per bfloat16 number, and what share of all lies below: percentiles of inputs.

Bins cover every finite number and do not depend on the data, so counts of any batches and shards add up, and what is
read from them does not depend on how tokens were batched. Numbers are rounded to bfloat16 to be counted: a percentile
of bfloat16 inputs is exact, one of wider inputs is off by at most 2^-8 of itself (half the step of 2^-7).
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BINS = 0x7F81  # bfloat16 numbers of at least 0, in order, and infinity last


def counts_of(x_BTI: jax.Array, real_BT: jax.Array) -> jax.Array:
    """How many elements of real tokens there are of each |x|, [BINS] int32. NaN counts as infinity."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x_BTI).astype(jnp.bfloat16), jnp.uint16)
    bins = jnp.minimum(bits.astype(jnp.int32), BINS - 1)
    bins = jnp.where(real_BT[..., None], bins, BINS)  # which is none, and dropped

    def of_row(bins_TI: jax.Array) -> jax.Array:
        return jnp.zeros(BINS, jnp.int32).at[bins_TI.reshape(-1)].add(1, mode='drop')

    return jnp.sum(jax.vmap(of_row)(bins), axis=0)  # row by row: rows may lie on different devices


def percentile_of(counts: np.ndarray, percent: float) -> np.ndarray:
    """The least |x| that `percent` of 100 elements do not exceed, of counts [..., BINS]: [...] float32.

    0 where nothing was counted.
    """
    upto = np.cumsum(np.asarray(counts, np.float64), axis=-1)
    wanted = upto[..., -1:] * percent / 100
    bins = np.argmax((upto >= wanted) & (upto > 0), axis=-1)
    return bins.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
