"""Rows of an embedding table by token id."""

from __future__ import annotations

import jax.numpy as jnp


def embed_lookup(table_VD, ids_BT):
    """Rows of table [V, D] for int32 ids [B, T] -> [B, T, D] in the table's dtype."""
    return jnp.take(table_VD, ids_BT, axis=0)
