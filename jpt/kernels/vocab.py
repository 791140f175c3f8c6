"""Rows of an embedding table by token id, where the table's rows may be cut over mesh axes."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size, axis_index, local, psum
from jpt.kernels.parallel_attention import ROWS, SEQUENCE

VOCAB = ('pipe', 'tensor')


def embed_lookup(table_VD, ids_BT, *, vocab_axes: tuple[str, ...] = VOCAB):
    """Rows of table [V, D] for int32 ids [B, T] -> [B, T, D] in the table's dtype.

    With rows cut over `vocab_axes` every shard looks up the ids it has and the results are added: the table is never
    gathered. Where an outer shard_map holds one of these axes manual, the table is this shard's rows already and the
    ids are the same on all of them. The table's gradient is added up in at least float32; over axes that are manual
    outside (data, context) it is this shard's part. An id outside the table gives zeros.

    Raises:
      ValueError: a table whose rows do not divide over the axes.
    """
    if table_VD.shape[0] % auto_size(vocab_axes):
        sizes = ' x '.join(f'{name}={auto_size([name])}' for name in vocab_axes)
        raise ValueError(f'embed_lookup: a table of {table_VD.shape[0]} rows does not divide over {sizes}: pad it')
    return _lookup(tuple(vocab_axes), table_VD, ids_BT)


class _Layout(NamedTuple):
    ids: P
    token_axes: tuple[str, ...]
    vocab_axes: tuple[str, ...]
    scatter: str | None  # the axis over which the table's gradient comes out cut by width


def _layout(vocab_axes: tuple[str, ...], shape, width: int) -> _Layout:
    """How ids are split over the automatic axes, where they divide; the table by rows."""
    rows = auto(ROWS) if shape[0] % auto_size(ROWS) == 0 else ()
    sequence = auto([SEQUENCE]) if len(shape) > 1 and shape[1] % auto_size([SEQUENCE]) == 0 else ()
    scatter = 'fsdp' if 'fsdp' in rows and width % auto_size(['fsdp']) == 0 else None
    return _Layout(P(*(rows, sequence)[: len(shape)]), (*rows, *sequence), auto(vocab_axes), scatter)


def _own(vocab_axes, rows: int, ids):
    """Local row of every id and whether it lies here."""
    row = ids - axis_index(vocab_axes) * rows
    return row, (row >= 0) & (row < rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(vocab_axes: tuple[str, ...], table_VD, ids):
    layout = _layout(vocab_axes, ids.shape, table_VD.shape[1])

    def shard(table, ids):
        row, here = _own(vocab_axes, table.shape[0], ids)
        found = jnp.where(here[..., None], jnp.take(table, row, axis=0, mode='clip'), 0)
        # All but one of the parts are zero, so adding them in the table's dtype is exact.
        return psum(found, vocab_axes)

    specs = P(layout.vocab_axes, None), layout.ids
    return local(shard, specs, layout.ids, (*layout.token_axes, *layout.vocab_axes))(table_VD, ids)


def _lookup_fwd(vocab_axes, table_VD, ids):
    # A zero-sized slice carries the table's shape and dtype to the backward pass without holding the table.
    return _lookup(vocab_axes, table_VD, ids), (ids, table_VD[:, :0])


def _lookup_bwd(vocab_axes, residuals, dout):
    ids, shape = residuals
    width = dout.shape[-1]
    layout = _layout(vocab_axes, ids.shape, width)
    rows = shape.shape[0] // auto_size(vocab_axes)

    def shard(ids, dout):
        row, here = _own(vocab_axes, rows, ids)
        start = jnp.zeros((rows, width), jnp.promote_types(dout.dtype, jnp.float32))
        # Negative indices would count from the end: send what is elsewhere behind the table, where it is dropped.
        gradient = start.at[jnp.where(here, row, rows)].add(dout.astype(start.dtype), mode='drop')
        if layout.scatter:
            gradient = lax.psum_scatter(gradient, layout.scatter, scatter_dimension=1, tiled=True)
        others = tuple(name for name in layout.token_axes if name != layout.scatter)
        return psum(gradient, others).astype(shape.dtype)

    out_spec = P(layout.vocab_axes, layout.scatter)
    run = local(shard, (layout.ids, layout.ids), out_spec, (*layout.token_axes, *layout.vocab_axes))
    return run(ids, dout), None


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
