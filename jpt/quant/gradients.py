"""Gradients of a product by products in eight bits, as FP8 training takes them: `FakeQuant.gradients`.

    y = x w^T        dx = dy w  adds up over outputs        dw = dy^T x  adds up over tokens

Every operand is rounded to E4M3 with a scale per run of neighbours along the axis that its product adds up, so that
scales can be multiplied in block by block: dy in runs of outputs for dx, dy and x in runs of tokens for dw (DeepSeek-V3
technical report, 2024, arXiv:2412.19437, section 3.3). The weight is rounded in squares, which transposed are squares:
dx is multiplied by the codes of the forward product. x is rounded for dw from what it was before the forward product
rounded it, so nothing is rounded twice. Sums are float32, and dw stays so.

Runs of tokens are those of one row of a batch [B, T, in], or of one group's rows: they begin anew in each, and the last
may be shorter. So they do not depend on microbatches and on how a batch lies on devices, as long as shards of T hold
whole runs. Rows of a group do lie otherwise on other meshes: experts' dw then differs by roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jpt.kernels.block_matmul import block_matmul
from jpt.kernels.block_quantize import quantize_rows
from jpt.kernels.block_tiles import BLOCK
from jpt.kernels.group_block_product import group_block_product
from jpt.kernels.grouped_matmul import grouped_matmul
from jpt.kernels.hopper import reason_not_hopper
from jpt.kernels.local import local, platform, psum
from jpt.kernels.local_products import Lies, block_product, cut, grouped_block_product, rounded
from jpt.quant.formats import Format
from jpt.quant.tensors import QTensor, numbers_of, quantize


def block_gradients(
    x: jax.Array, weight: QTensor, sizes_E: jax.Array | None, where: Lies | None, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x [..., in] (in its dtype) and of the weight (float32) from that of the product, dy [..., out].

    Args:
        x: as the product had it, before it was rounded.
        weight: E4M3 in squares, [out, in], or with sizes_E [E, out, in].
        sizes_E: where there are groups, how many rows of x [M, in] each has.
        where: how x and the weight lie on a mesh. None, and shards that would hold a part of a block, leave all to the
            compiler.
        dy: finite; a run with a NaN or infinity makes all that it reaches NaN.
    """
    squares = weight.format.rows == BLOCK and reason_not_hopper() is None
    where = where if squares and where and cut(where, *weight.shape[-2:]) is None else None
    if sizes_E is not None:
        given = x, weight, sizes_E, where, dy
        return _of_inputs_by_group(*given), _of_weights_by_group(*given)
    if where:
        return _of_inputs(weight, where, dy).astype(x.dtype), _of_weights(x, where, dy, weight.format)
    return _of_inputs_plain(weight, dy).astype(x.dtype), _of_weights_plain(x, dy, weight.format)


def _of_inputs(weight: QTensor, where: Lies, dy: jax.Array) -> jax.Array:
    """dx by the kernel of blockwise products, for which outputs are inputs."""
    turned = where._replace(out=where.inner, inner=where.out)
    codes, scales = rounded(_in_runs(weight.format), [dy], turned)
    return block_product(codes, scales, jnp.asarray(weight.codes).T, jnp.asarray(weight.scale).T, _result(dy), turned)


def _in_runs(form: Format) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    return lambda array: quantize_rows(array, BLOCK, form.scale)


def _of_inputs_plain(weight: QTensor, dy: jax.Array) -> jax.Array:
    """dx as a product of the numbers, float32."""
    contract = ((dy.ndim - 1,), (0,)), ((), ())
    return jax.lax.dot_general(_rounded_outputs(dy, weight.format), numbers_of(weight), contract)


def _of_weights(x: jax.Array, where: Lies, dy: jax.Array, form: Format) -> jax.Array:
    """dw by the kernel of blockwise products: [out, tokens] times [in, tokens] transposed, shard by shard."""

    def here(x: jax.Array, dy: jax.Array) -> jax.Array:
        (left, left_scale), (right, right_scale) = (_in_runs(form)(_tokens_last(array)) for array in (dy, x))
        dw_OI = block_matmul(left, left_scale, right, right_scale, jnp.float32)
        return psum(dw_OI, [name for names in where.lead for name in names or ()])

    return local(here, (where.inputs, where.outputs), where.weight, where.axes)(x, dy)


def _of_weights_plain(x: jax.Array, dy: jax.Array, form: Format) -> jax.Array:
    """dw as a product of the numbers, float32."""
    left, right = (_rounded_tokens(_with_rows(array), form) for array in (dy, x))
    tokens = tuple(range(left.ndim - 1))
    return jax.lax.dot_general(left, right, ((tokens, tokens), ((), ())))


def _of_inputs_by_group(
    x: jax.Array, weight: QTensor, sizes_E: jax.Array, where: Lies | None, dy: jax.Array
) -> jax.Array:
    """dx of rows that are sorted by group; `where`: by the kernel."""
    if where is None:
        return by_group_of_inputs(x, weight, sizes_E, _rounded_outputs(dy, weight.format))
    codes, scales = rounded(_in_runs(weight.format), [dy], where)
    turned = jnp.swapaxes(weight.codes, 1, 2), jnp.swapaxes(weight.scale, 1, 2)
    return grouped_block_product(codes, scales, *turned, sizes_E, _result(dy)).astype(x.dtype)


def _of_weights_by_group(
    x: jax.Array, weight: QTensor, sizes_E: jax.Array, where: Lies | None, dy: jax.Array
) -> jax.Array:
    """dw [E, out, in], float32, of rows that are sorted by group; `where`: by the kernel, alike on all devices."""
    form = weight.format
    runs_E = -(-sizes_E // form.rows)
    from_R = _rows_of_whole_runs(x.shape[0], sizes_E, form.rows)
    if where is None:  # zeros behind groups are multiplied too
        seen, rounded_dy = (_rounded_tokens(_rows(array, from_R), form) for array in (x, dy))
        return by_group_of_weights(seen, weight, runs_E * form.rows, rounded_dy, x.dtype)

    def here(x: jax.Array, dy: jax.Array, from_R: jax.Array, runs_E: jax.Array) -> jax.Array:
        # Rows are read as they lie and then transposed, which XLA otherwise makes one gather of numbers far apart.
        lie = (with_layout_constraint(_rows(array, from_R), Layout((0, 1))) for array in (dy, x))
        (left, left_scale), (right, right_scale) = (_in_runs(form)(array.T) for array in lie)
        return group_block_product(left, left_scale, right, right_scale, runs_E)

    return local(here, P(), P(), where.axes)(x, dy, from_R, runs_E)


def by_group_of_inputs(x: jax.Array, weight: QTensor, sizes_E: jax.Array, rounded_dy: jax.Array) -> jax.Array:
    """dx in the dtype of x, as products of the numbers of dy, rounded, and of the weight."""
    dtype = _operand_dtype(x.dtype)
    unused = jnp.zeros(x.shape, dtype)  # x has no part in its own gradient
    _, pull = jax.vjp(lambda x: grouped_matmul(x, numbers_of(weight).astype(dtype), sizes_E), unused)
    return pull(rounded_dy.astype(dtype))[0].astype(x.dtype)


def by_group_of_weights(
    seen: jax.Array, weight: QTensor, sizes_E: jax.Array, rounded_dy: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """dw [E, out, in], float32, as products of the numbers of dy and x, both rounded; `dtype`: of x before that."""
    own = _operand_dtype(dtype)
    unused = jnp.zeros(weight.shape, jnp.float32)  # the weight has no part in its own gradient
    return jax.vjp(lambda w: grouped_matmul(seen.astype(own), w, sizes_E), unused)[1](rounded_dy.astype(own))[0]


def _rounded_outputs(dy: jax.Array, form: Format) -> jax.Array:
    """dy rounded in runs along its last axis, float32."""
    rows = dy.astype(jnp.float32)[..., None, :]
    return numbers_of(quantize(rows, Format('e4m3', 1, form.columns, form.scale)))[..., 0, :]


def _rounded_tokens(x: jax.Array, form: Format) -> jax.Array:
    """x [..., T, n] rounded in runs along T, float32."""
    return numbers_of(quantize(x.astype(jnp.float32), Format('e4m3', form.rows, 1, form.scale)))


def _rows_of_whole_runs(M: int, sizes_E: jax.Array, block: int) -> jax.Array:
    """Which of M rows, sorted by group, stands where if every group ends with a whole run: [room], M for none.

    `room` is what any sizes need at most: a run for each group that has a row, one more for every `block` further rows.
    """
    E, whole_E = sizes_E.shape[0], -(-sizes_E // block) * block
    ends_E, whole_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(whole_E)
    some = min(M, E)
    place_R = jnp.arange((some + (M - some) // block) * block)
    group_R = jnp.searchsorted(whole_ends_E, place_R, side='right', method='compare_all')
    group_R = jnp.minimum(group_R, E - 1)
    from_R = place_R - (whole_ends_E - whole_E - (ends_E - sizes_E))[group_R]
    # The barrier: found once, not again for every number that is read there.
    return jax.lax.optimization_barrier(jnp.where(from_R < ends_E[group_R], from_R, M))


def _rows(x_MI: jax.Array, from_R: jax.Array) -> jax.Array:
    """The rows [room, I] that `_rows_of_whole_runs` names, zeros for none."""
    return jnp.take(x_MI, from_R, axis=0, mode='fill', fill_value=0)


def _with_rows(x: jax.Array) -> jax.Array:
    """[..., n] as [B, T, n], where a single vector is a row of one token."""
    lead = x.shape[:-1] or (1,)
    return x.reshape(math.prod(lead[:-1]), lead[-1], x.shape[-1])


def _tokens_last(x: jax.Array) -> jax.Array:
    """[..., T, n] as [n, tokens], every row of T filled up with zeros to whole runs."""
    x_BTN = _with_rows(x)
    short = -x_BTN.shape[1] % BLOCK
    x_BTN = jnp.pad(x_BTN, ((0, 0), (0, short), (0, 0))) if short else x_BTN
    return x_BTN.reshape(-1, x.shape[-1]).T


def _operand_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What grouped products of numbers are made of: on GPUs x's dtype, which tensor cores take; else float32."""
    return dtype if platform() == 'gpu' and dtype in (jnp.bfloat16, jnp.float16) else jnp.dtype(jnp.float32)


def _result(dy: jax.Array) -> jnp.dtype:
    """The dtype in which a kernel hands over dx."""
    return dy.dtype if dy.dtype in (jnp.bfloat16, jnp.float16) else jnp.dtype(jnp.float32)
