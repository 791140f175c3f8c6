"""A vocabulary that may be cut over mesh axes: what is summed, picked and masked is the same for a whole and a part."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpt.kernels.local import axis_index, axis_size, pmax, psum

# The logit of a padded column. Finite, so that a product with a zero probability is zero.
PADDED = -1e30


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that are here: `size` of them, of which those below `vocab_size` overall are real.

    Columns go over the manual ones of `axes`, the first axis varying slowest.
    """

    axes: tuple[str, ...]
    size: int
    vocab_size: int

    @property
    def columns_V(self) -> jax.Array:
        """Token id of every local column, int32."""
        return axis_index(self.axes) * self.size + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def padded(self) -> bool:
        """Whether the vocabulary, over all shards, has columns that are not real."""
        return self.size * axis_size(self.axes) != self.vocab_size

    def mask(self, logits_CV, value=PADDED):
        """The same logits with padded columns set to `value`."""
        if not self.padded:
            return logits_CV
        return jnp.where((self.columns_V < self.vocab_size)[None], logits_CV, value)

    def sum(self, parts):
        """Sum over shards of every leaf."""
        return psum(parts, self.axes)

    def max(self, logits_CV):
        """Largest logit of every token, [C]."""
        return pmax(jnp.max(logits_CV, axis=-1), self.axes)

    def hits(self, ids_C):
        """Where the local column is the token's id, bool [C, V]."""
        return self.columns_V[None] == ids_C[:, None]

    def pick(self, values_CV, ids_C):
        """The local part of values at the token's id, [C]: 0 where the column is elsewhere. Sum over shards for it."""
        column = ids_C - axis_index(self.axes) * self.size
        here = (column >= 0) & (column < self.size)
        found = jnp.take_along_axis(values_CV, jnp.clip(column, 0, self.size - 1)[:, None], axis=-1)[:, 0]
        return jnp.where(here, found, 0)

    def log_normalizer(self, logits_CV, peak_C):
        """log sum exp over the whole vocabulary [C], from logits and the largest of each token."""
        return peak_C + jnp.log(self.sum(jnp.sum(jnp.exp(logits_CV - peak_C[:, None]), axis=-1)))
