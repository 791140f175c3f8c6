"""An exponential moving average of the trained parameters."""

from typing import Any

import jax
import jax.numpy as jnp


def init_ema(params: Any) -> Any:
    """The first average: the parameters themselves, in at least float32 (bfloat16 would drop the small steps)."""
    return jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)) + 0, params)


def update_ema(ema: Any, params: Any, decay: float, count: jax.Array) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf.

    While `count` updates (a scalar, the present one included) are few, decay is at most (1 + count) / (10 + count), so
    that the average forgets the first parameters at once instead of after 1 / (1 - decay) updates.
    """
    seen = count.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + seen) / (10 + seen))
    return jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new.astype(old.dtype) - old), ema, params)


def averaged(ema: Any, params: Any) -> Any:
    """The average in the dtypes of the parameters; the parameters where there is none."""
    return params if ema is None else jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), ema, params)


def _wide(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)
