"""Rows that lie sorted by the shard they are for, exchanged between shards in rounds of a stated size, and back.

Which rows travel in a round follows from one matrix, the number of rows that each shard has for each, so every shard
knows the whole round. Two forms move them. 'ragged' sends these rows and nothing else (`lax.ragged_all_to_all`; XLA has
none on CPU): all that are for one shard wait in one line. 'padded' sends a block of as many rows from every shard to
every other (`lax.all_to_all`): the rows of each pair wait in a line of their own. Both take `room` rows of every line
in a round, and what arrives lies without gaps, by the shards it came from.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpt.kernels.local import axis_index, platform

FORMS = ('padded', 'ragged')


def check_form(form: str) -> None:
    """Raises ValueError for another form than these, and for 'ragged' where XLA does not have it."""
    if form not in FORMS:
        raise ValueError(f'exchange={form!r}: expected one of {", ".join(FORMS)}')
    if form == 'ragged' and platform() != 'gpu':
        raise ValueError(f"exchange='ragged' cannot be used: the platform is {platform()}, not gpu")


class Exchange(NamedTuple):
    """What is fixed when the program is traced; see `make_exchange`."""

    form: str
    axis: str
    shards: int
    rows: int  # of every shard
    room: int  # rows of a line that travel in a round

    @property
    def capacity(self) -> int:
        """The most rows that reach a shard in a round."""
        return self.room if self.form == 'ragged' else self.shards * self.room

    @property
    def rounds(self) -> int:
        """Rounds that deliver every row, whatever the loads."""
        return -(-_longest(self.form, self.shards, self.rows) // self.room)

    def needed(self, load_SR: jax.Array) -> jax.Array:
        """Rounds that deliver every row of these loads, int32; the same on every shard."""
        lines = jnp.sum(load_SR, axis=0, dtype=jnp.int32) if self.form == 'ragged' else load_SR
        return jnp.max(-(-lines // self.room))


def make_exchange(form: str, axis: str, shards: int, rows: int, factor: float) -> Exchange:
    """An exchange of `rows` rows of every shard along `axis`, with room for `factor` times an even share in a round."""
    longest = _longest(form, shards, rows)
    room = min(longest, 8 * math.ceil(factor * longest / shards / 8))
    return Exchange(form, axis, shards, rows, room)


def _longest(form: str, shards: int, rows: int) -> int:
    """Rows of a line that gets all there are: of every shard, or of one."""
    return shards * rows if form == 'ragged' else rows


class Round(NamedTuple):
    """What every shard sends to every other, int32 [senders, receivers]."""

    begins_SR: jax.Array  # where the rows of a pair begin at the sender
    sizes_SR: jax.Array  # how many they are
    places_SR: jax.Array  # where they begin at the receiver

    def back(self) -> Round:
        """The same rows from where they are now to where they were."""
        return Round(self.places_SR.T, self.sizes_SR.T, self.begins_SR.T)


def round_of(exchange: Exchange, load_SR: jax.Array, turn: jax.Array) -> Round:
    """The rows of round `turn`: of every line those at places turn * room to (turn + 1) * room.

    Args:
      load_SR: int32 [senders, receivers], rows for each shard; a sender's lie in the order of receivers.
    """
    ahead = _before(load_SR, 0) if exchange.form == 'ragged' else jnp.zeros_like(load_SR)
    first = jnp.clip(turn * exchange.room - ahead, 0, load_SR)
    sizes = jnp.clip((turn + 1) * exchange.room - ahead, 0, load_SR) - first
    return Round(_before(load_SR, 1) + first, sizes, _before(sizes, 0))


def _before(sizes, axis: int):
    """Sums of what comes before each along an axis."""
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sent(rows_MD, travel: Round, exchange: Exchange):
    """The rows that reach this shard in a round [capacity, D], by sender; 0 beyond them."""
    return _moved(rows_MD, travel, exchange, exchange.capacity)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def returned(arrived_CD, travel: Round, exchange: Exchange):
    """The inverse of `sent`, and its transpose: [rows, D], with 0 for rows of other rounds."""
    return _moved(arrived_CD, travel.back(), exchange, exchange.rows)


def _sent(rows_MD, travel, exchange):
    return sent(rows_MD, travel, exchange), travel


def _returned(arrived_CD, travel, exchange):
    return returned(arrived_CD, travel, exchange), travel


# JAX's own transpose of lax.ragged_all_to_all also makes a gradient for the zeros that rows are written to.
sent.defvjp(_sent, lambda exchange, travel, d_CD: (returned(d_CD, travel, exchange), None))
returned.defvjp(_returned, lambda exchange, travel, d_MD: (sent(d_MD, travel, exchange), None))


def _moved(x_MD, travel: Round, exchange: Exchange, count: int):
    """[count, D]: what other shards have for this one, at the places that `travel` says, and 0 elsewhere."""
    me = axis_index([exchange.axis])
    begins, sizes, places = (matrix[me] for matrix in travel)
    arriving = travel.sizes_SR[:, me]
    if exchange.form == 'ragged':
        empty = jnp.zeros((count, x_MD.shape[1]), x_MD.dtype)
        return ragged_all_to_all(x_MD, empty, begins, sizes, places, arriving, exchange.axis)
    slots = begins[:, None] + jnp.arange(exchange.room, dtype=jnp.int32)[None]
    blocks = lax.all_to_all(x_MD[jnp.minimum(slots, len(x_MD) - 1)], exchange.axis, split_axis=0, concat_axis=0)
    starts, row = travel.places_SR[:, me], jnp.arange(count, dtype=jnp.int32)
    sender = jnp.maximum(jnp.searchsorted(starts, row, side='right') - 1, 0)
    offset = row - starts[sender]
    here = (offset >= 0) & (offset < arriving[sender])
    return jnp.where(here[:, None], blocks[sender, jnp.clip(offset, 0, exchange.room - 1)], 0)


def ragged_all_to_all(x_MD, output_CD, begins_R, sizes_R, places_R, arriving_S, axis: str):
    """`lax.ragged_all_to_all`; places are those in the receivers' outputs. What runs on CPU instead replaces this."""
    return lax.ragged_all_to_all(x_MD, output_CD, begins_R, sizes_R, places_R, arriving_S, axis_name=axis)
