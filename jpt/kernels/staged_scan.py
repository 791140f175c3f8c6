"""A scan over layers whose stacks may be divided over `pipe`: every stage of it keeps its own layers.

The stages take turns: in each turn every device runs the layers that it has, on what it is given, and what the stage
whose turn it is makes of it goes to all. So a model's memory is divided, and its time is that of one device; several
microbatches at a time are the business of jpt/sharding/pipeline.py, in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jpt.kernels.local import auto, auto_size

PIPE = 'pipe'


def staged_scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, stacks: Any, unroll: int = 1) -> Any:
    """`jax.lax.scan(body, carry, stacks)`, on a mesh with an automatic axis `pipe` stage by stage.

    Args:
      stacks: leaves [R, ...]. Where `pipe` divides R it divides the stacks, and what is stacked up in return; else
        every device has all of them.
    """
    stages = auto_size([PIPE])
    if not auto([PIPE]) or jax.tree.leaves(stacks)[0].shape[0] % stages:
        return jax.lax.scan(body, carry, stacks, unroll=unroll)

    def here(carry: Any, stacks: Any) -> Any:
        me = jax.lax.axis_index(PIPE)

        def turn(state: tuple[Any, Any], stage: jax.Array) -> tuple[tuple[Any, Any], None]:
            after, found = jax.lax.scan(body, state[0], stacks, unroll=unroll)
            mine = me == stage
            after = jax.tree.map(lambda x: jax.lax.psum(jnp.where(mine, x, jnp.zeros_like(x)), PIPE), after)
            return (after, jax.tree.map(lambda new, old: jnp.where(mine, new, old), found, state[1])), None

        shapes = jax.eval_shape(lambda carry: jax.lax.scan(body, carry, stacks)[1], carry)
        found = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(turn, (carry, found), jnp.arange(stages))[0]

    divided = jax.shard_map(here, in_specs=(P(), P(PIPE)), out_specs=(P(), P(PIPE)), axis_names={PIPE}, check_vma=False)
    return divided(carry, stacks)
