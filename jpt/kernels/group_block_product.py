"""Blockwise FP8 products of the rows of each group: gradients of quantized experts' weights.

    y[e, o, k] = sum over runs r of group e: a_scale[o, r] * b_scale[k, r] * (a[o, r's 128] . b[k, r's 128])

A run is 128 neighbours along the axis that is added up, the rows of one group, with zeros behind the last; groups
follow one another. Where a group has no runs y is 0. Nothing here is differentiated, and nothing knows a mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpt.kernels.block_matmul import check_codes, check_scales, chosen, in_blocks, refusal
from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.local import platform


def group_block_product(a_OR, a_scale, b_KR, b_scale, runs_E, *, implementation: str = 'auto'):
    """Codes a [O, R] times b [K, R] transposed, group by group -> float32 [E, O, K].

    Args:
      a_scale, b_scale: float32 [O, R / 128] and [K, R / 128].
      runs_E: int32, how many runs of 128 each group has, in order; their sum is at most R / 128, and what is behind it
        is left out, whatever codes and scales hold there.
      implementation: as in `block_matmul`.

    Raises:
      ValueError: shapes or dtypes that do not belong together, an R that is no multiple of 128, an unknown
        implementation or one that cannot be used.
    """
    place = 'group_block_product'
    (O, R), K = check_codes(place, a_OR, a_scale, b_KR, 2), b_KR.shape[0]
    if R % BLOCK:
        raise ValueError(f'{place}: {R} rows: expected a multiple of {BLOCK}')
    check_scales(place, {'a_scale': (a_scale, (O, R // BLOCK)), 'b_scale': (b_scale, (K, R // BLOCK))})
    if runs_E.ndim != 1 or runs_E.dtype != jnp.int32:
        raise ValueError(f'{place}: runs_E {runs_E.dtype}{runs_E.shape}: expected int32 of one axis')
    if chosen(place, implementation, jnp.float32, refusal(a_OR, b_KR, jnp.float32)) == 'mosaic':
        from jpt.kernels.mosaic_group_block import product  # Pallas: not loaded where it is not used

        return product(a_OR, a_scale, b_KR, b_scale, runs_E)
    return reference(a_OR, a_scale, b_KR, b_scale, runs_E)


def reference(a_OR, a_scale, b_KR, b_scale, runs_E):
    """The formula above, run after run, in float32."""
    ends_E = jnp.cumsum(runs_E)
    E, runs = runs_E.shape[0], a_scale.shape[1]
    group_R = jnp.searchsorted(ends_E, jnp.arange(runs), side='right')  # E where a run is of no group
    operand = jnp.bfloat16 if platform() == 'gpu' else jnp.float32  # as in block_matmul.py

    def add_run(total_EOK, run):
        a_OC, a_scale_O, b_KC, b_scale_K, group = run
        product_OK = jax.lax.dot_general(
            a_OC.astype(operand), b_KC.astype(operand), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total_EOK.at[group].add(product_OK * (a_scale_O[:, None] * b_scale_K[None]), mode='drop'), None

    given = in_blocks(a_OR), a_scale.T, in_blocks(b_KR), b_scale.T, group_R
    return jax.lax.scan(add_run, jnp.zeros((E, a_OR.shape[0], b_KR.shape[0]), jnp.float32), given)[0]
