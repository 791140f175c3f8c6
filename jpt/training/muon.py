"""The direction of Muon: momentum made orthogonal by Newton-Schulz iterations, matrix by matrix.

Kernels are stored (out, in) and stacked: the last two axes are one matrix, all axes before them count matrices.
Queries, keys and values are separate leaves, so each is orthogonalized alone. Source: K. Jordan et al. 2024, "Muon: an
optimizer for hidden layers in neural networks"; the 'rms' scale is that of Liu et al. 2025, arXiv:2502.16982.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

Scale = Literal['spectral', 'rms']

# The quintic whose iteration lifts all singular values to between about 0.7 and 1.2 in five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: jax.Array, steps: int = 5, dtype: jnp.dtype | None = None) -> jax.Array:
    """Replaces the singular values of each matrix [..., out, in] by values near one, in float32 or `dtype`.

    A matrix of zeros stays zero.
    """
    x = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-20)
    x = x.astype(dtype or x.dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products below are then of the smaller side
        x = jnp.swapaxes(x, -2, -1)
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -2, -1)
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return jnp.swapaxes(x, -2, -1) if tall else x


def scale_of(shape: tuple[int, ...], scale: Scale) -> float:
    """What the orthogonal matrix [..., out, in] is multiplied by.

    'spectral': sqrt(max(1, out / in)), learning rates are Muon's own (0.02 is usual). 'rms': 0.2 sqrt(max(out, in)),
    which gives the update the size that AdamW's have, so that learning rate and decay of AdamW serve.
    """
    out, inner = shape[-2:]
    return math.sqrt(max(1.0, out / inner)) if scale == 'spectral' else 0.2 * math.sqrt(max(out, inner))
