"""Keys and values in eight bits: codes of E4M3 with one scale for a whole tensor, number = code * scale.

What ModelOpt's `k_bmm_quantizer` and vLLM's FP8 cache compute: code = E4M3(x / scale), beyond 448 the largest.
"""

import jax
import jax.numpy as jnp

from jpt.kernels import low_precision as low


def cache_codes(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The codes (float8_e4m3fn) of x, of any floating dtype, with a positive scale, float32 []; divided in float32."""
    return low.to_e4m3(low.exact_divide(x.astype(jnp.float32), scale))


def cache_numbers(codes: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What codes stand for: multiplied in at least float32, then rounded to the dtype."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return (codes.astype(wide) * scale.astype(wide)).astype(dtype)


@jax.custom_vjp
def cache_rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x as a cache would give it back, in its dtype. Backward it is the identity (straight through)."""
    return cache_numbers(cache_codes(x, scale), scale, x.dtype)


def _forward(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cache_rounded(x, scale), scale


def _backward(scale: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy, jnp.zeros_like(scale)


cache_rounded.defvjp(_forward, _backward)
