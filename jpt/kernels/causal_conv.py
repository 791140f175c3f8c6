"""The short depthwise convolution of Mamba over packed rows, and the tail that lets a row go on.

Every channel is filtered on its own with the last W inputs of its segment (Dao and Gu 2024, section 7; W is 4 in all
published models), so the work is a sum of W shifted products, which XLA makes one pass over memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jpt.kernels.local import auto, manual
from jpt.kernels.parallel_attention import SEQUENCE


class ConvTail(NamedTuple):
    """What the next call needs to go on where a row stopped."""

    inputs_BWC: jax.Array  # [B, W - 1, C], the last inputs of the segment below, oldest first; 0 where it had fewer
    segment_B: jax.Array  # int32, the segment of the row's last real token; 0: there was none yet


def init_tail(batch: int, width: int, channels: int, dtype: DTypeLike) -> ConvTail:
    """The tail of rows that have read nothing, for a kernel of `width`."""
    return ConvTail(jnp.zeros((batch, width - 1, channels), dtype), jnp.zeros(batch, jnp.int32))


def refuse_context(name: str) -> None:
    """Raises ValueError where the sequence is cut over a mesh axis: a scan in time would have to pass its state on."""
    if auto([SEQUENCE]) or manual([SEQUENCE]):
        raise ValueError(
            f'{name}: the mesh has {SEQUENCE} > 1: a sequence cut over devices is not supported by layers that carry a '
            f'state; expected {SEQUENCE}=1 (data, fsdp and tensor may be larger)'
        )


def causal_conv(
    x_BTC: jax.Array,
    kernel_CW: jax.Array,
    bias_C: jax.Array | None,
    segments_BT: jax.Array,
    state: ConvTail | None = None,
) -> tuple[jax.Array, ConvTail]:
    """y_t = bias + sum_w kernel[:, w] * x_{t - (W - 1) + w} over inputs of the same segment -> (y [B, T, C], tail).

    Sums are held in at least float32; y has the dtype of x. The backward pass keeps the arguments only.

    Args:
      x_BTC: inputs, C channels, any float dtype.
      kernel_CW: a filter per channel, the newest input last (`conv1d.weight` of a checkpoint without its middle axis).
      bias_C: added at every real token, or None.
      segments_BT: int, 0 = padding. The tokens of a segment lie together. Padding may stand at either end of a row and
        counts as if it were not there: what x holds in it (NaN too) reaches nothing, and y is 0.
      state: the tail of an earlier call, or None at the start. A row whose first segment is that of the tail goes on.

    Returns:
      y, and the tail after the row's last real token (the one given, where a row holds padding only).

    Raises:
      ValueError: shapes that do not fit; a mesh whose `context` axis is larger than 1.
    """
    refuse_context('causal_conv')
    B, _, C = x_BTC.shape
    width = kernel_CW.shape[-1]
    if kernel_CW.shape != (C, width) or width < 2 or (bias_C is not None and bias_C.shape != (C,)):
        bias = None if bias_C is None else bias_C.shape
        raise ValueError(f'causal_conv: kernel {kernel_CW.shape}, bias {bias}: expected ({C}, 2 or more) and ({C},)')
    if state is not None and state.inputs_BWC.shape != (B, width - 1, C):
        raise ValueError(f'causal_conv: tail {state.inputs_BWC.shape}: expected {(B, width - 1, C)}')
    segments_BT = segments_BT.astype(jnp.int32)
    x_BEC, segments_BE, end_B = _extended(x_BTC, segments_BT, width - 1, state)
    y_BTC = jax.checkpoint(_filtered, prevent_cse=False)(x_BEC, kernel_CW, bias_C, segments_BE, segments_BT)
    return y_BTC, _tail(x_BEC, segments_BE, end_B, width - 1)


def _extended(x_BTC: jax.Array, segments_BT: jax.Array, before: int, state: ConvTail | None):
    """Inputs and segments with `before` slots more on the left, and the slot after the last real input of each row.

    A tail is set directly before the first real token (in rows without one, at the end), so that padding at the start
    of a row does not come between them.
    """
    T = x_BTC.shape[1]
    x_BEC = jnp.pad(x_BTC, ((0, 0), (before, 0), (0, 0)))
    segments_BE = jnp.pad(segments_BT, ((0, 0), (before, 0)))
    slots_1E = jnp.arange(before + T)[None]
    real_BE = segments_BE != 0
    first_B = jnp.min(jnp.where(real_BE, slots_1E, before + T), axis=1)
    end_B = jnp.where(first_B == before + T, before + T, 1 + jnp.max(jnp.where(real_BE, slots_1E, -1), axis=1))
    if state is not None:
        for w in range(before):
            here_BE = slots_1E == first_B[:, None] - before + w
            x_BEC = jnp.where(here_BE[:, :, None], state.inputs_BWC[:, w, None].astype(x_BTC.dtype), x_BEC)
            segments_BE = jnp.where(here_BE, state.segment_B[:, None], segments_BE)
    return x_BEC, segments_BE, end_B


def _filtered(
    x_BEC: jax.Array, kernel_CW: jax.Array, bias_C: jax.Array | None, segments_BE: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """The convolution at the last T slots, of which those that hold a part of the tail are padding still."""
    C, width = kernel_CW.shape
    T = segments_BT.shape[1]
    stats = jnp.promote_types(x_BEC.dtype, jnp.float32)
    real_BT = segments_BT != 0
    y_BTC = jnp.zeros((1, 1, C), stats) if bias_C is None else bias_C.astype(stats)[None, None]
    for w in range(width):
        # Masked before the product: NaN in padding would reach the kernel's gradient otherwise.
        seen_BT = real_BT & (segments_BE[:, w : w + T] == segments_BT)
        shifted_BTC = jnp.where(seen_BT[:, :, None], x_BEC[:, w : w + T], 0)
        y_BTC = y_BTC + kernel_CW[:, w].astype(stats)[None, None] * shifted_BTC.astype(stats)
    return jnp.where(real_BT[:, :, None], y_BTC, 0).astype(x_BEC.dtype)


def _tail(x_BEC: jax.Array, segments_BE: jax.Array, end_B: jax.Array, size: int) -> ConvTail:
    """The `size` inputs before `end_B`, those of other segments than the last as 0."""
    last_B = jnp.take_along_axis(segments_BE, end_B[:, None] - 1, axis=1)[:, 0]
    slots_BW = end_B[:, None] + jnp.arange(-size, 0)[None]
    inputs_BWC = jnp.take_along_axis(x_BEC, slots_BW[:, :, None], axis=1)
    own_BW = (jnp.take_along_axis(segments_BE, slots_BW, axis=1) == last_B[:, None]) & (last_B[:, None] != 0)
    return ConvTail(jnp.where(own_BW[:, :, None], inputs_BWC, 0), last_B)
