"""The search for the scales of a weight that make the squares of its errors least, block by block."""

from functools import partial

import jax
import jax.numpy as jnp

from jpt.kernels import low_precision as low
from jpt.quant.formats import Format
from jpt.quant.tensors import Array, block_amax, in_blocks, numbers_of, quantize, scales_of, spread

# Of the largest value of a block. Below 1 the largest saturate and the others gain; above 1 numbers of floating point
# fall on other points, whose pattern repeats with every power of two. 1 comes first, so that it stays where nothing is
# better.
MULTIPLIERS = (1.0, *(round(0.05 * n, 2) for n in range(6, 31) if n != 20))


@partial(jax.jit, static_argnums=(1, 3))
def searched_amax(
    weight: Array,
    form: Format,
    squares_I: Array | None = None,
    multipliers: tuple[float, ...] = MULTIPLIERS,
    factor: Array | None = None,
    scale_2: Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """(amax, scale_2) of a weight [..., out, in] for `quantize`: of every block that with the least error.

    The error of a block is the sum of (number - weight)^2, times `squares_I` of its column where they are given: the
    mean squares [..., in] of the inputs make it the mean square of what the error adds to the output, as far as inputs
    are uncorrelated. It is taken from what `quantize` writes, so no other of the multipliers does better; of equal ones
    the first is kept.

    Leading axes are worked on one by one: there is one matrix in float32 at a time, and a few of its like. They are to
    lie whole on every device.

    Returns:
        amax: [..., out / rows, in / columns] float32.
        scale_2: [..., 1, 1], the one given or that of the largest values as they are, which the search keeps; None
            where the format has none.
    """
    weight = jnp.asarray(weight)
    *lead, out, inner = weight.shape
    squares = jnp.ones(inner) if squares_I is None else jnp.asarray(squares_I)
    squares = jnp.broadcast_to(squares, (*lead, inner)).astype(jnp.float32)
    given = {'weight': weight.reshape(-1, out, inner), 'squares_I': squares.reshape(-1, inner)}
    if factor is not None:
        given['factor_I'] = jnp.broadcast_to(jnp.asarray(factor), (*lead, inner)).reshape(-1, inner)
    if scale_2 is not None:
        given['second'] = jnp.broadcast_to(jnp.asarray(scale_2), (*lead, 1, 1)).reshape(-1, 1, 1)
    search = partial(_search, form=form, multipliers=multipliers)
    amax, second = jax.lax.map(lambda one: search(**one), given)
    amax = amax.reshape(*lead, *amax.shape[1:])
    return amax, None if second is None else second.reshape(*lead, 1, 1)


def _search(
    weight: jax.Array,
    squares_I: jax.Array,
    form: Format,
    multipliers: tuple[float, ...],
    factor_I: jax.Array | None = None,
    second: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The same of a matrix [out, in]."""
    wide = weight.astype(jnp.float32)
    if factor_I is not None:
        wide = low.exact_divide(wide, factor_I[None])
    largest = block_amax(wide, form)
    second = scales_of(largest, form, second)[1]
    # Squares of relative errors do not leave float32, however small the weights are.
    unit = spread(jnp.where(largest > 0, largest, 1), wide.shape, form)
    mean = jnp.mean(squares_I)
    squares_I = squares_I / jnp.where(mean > 0, mean, 1)

    def tried(best: tuple[jax.Array, jax.Array], multiplier: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        least, amax = best
        candidate = largest * multiplier
        error = (numbers_of(quantize(wide, form, amax=candidate, scale_2=second)) - wide) / unit
        total = jnp.sum(jnp.sum(in_blocks(jnp.square(error) * squares_I[None], form), axis=-1), axis=-2)
        better = total < least
        return (jnp.where(better, total, least), jnp.where(better, candidate, amax)), None

    start = jnp.full(largest.shape, jnp.inf), largest
    (_, amax), _ = jax.lax.scan(tried, start, jnp.asarray(multipliers, jnp.float32))
    return amax, second
