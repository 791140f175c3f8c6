"""What training carries from step to step, and nothing else."""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """Everything that a step reads and writes; a checkpoint holds it whole.

    params: the trainable leaves of the model, None where a leaf is frozen.
    frozen: {'model': the other leaves}, and {'teacher': a whole model} where there is one.
    ema: a moving average of params, or None.
    """

    step: jax.Array  # int32, steps taken
    params: Any
    frozen: dict[str, Any]
    opt_state: Any
    ema: Any
    key: jax.Array
