"""Time that Python takes to dispatch a training step of 32 layers, beside a plain function of as many arrays.

    python benchmarks/dispatch.py [--layers=32] [--steps=200] [--json]

One call of the job's jitted step with the state donated, as the loop calls it, until it returns, which is before the
device is done. The wait for the result between calls is not counted. On the CPU the device's threads want the same
cores as Python, so the CPU time of the calling thread is printed beside the time on the clock.

The floor is `jax.jit(lambda *arrays: arrays)` over the same arrays, donated as well; all take turns. Layers are
stacked, so the number of arrays does not depend on --layers: the last row is the floor of a step whose layers are not.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jobs import random_job
from timing import machine

from jpt.training.job import first_state

GOAL_MS = 0.5
ROUNDS, WARM = 4, 5  # turns of each function; calls of a turn that are not counted: the very first one compiles
ROWS, LENGTH = 1, 4


def stack(layers: int) -> dict[str, Any]:
    """The config.json of a stack of tiny layers."""
    return {
        'model_type': 'qwen3',
        'vocab_size': 32,
        'hidden_size': 8,
        'intermediate_size': 8,
        'num_hidden_layers': layers,
        'num_attention_heads': 2,
        'num_key_value_heads': 1,
        'head_dim': 4,
        'max_position_embeddings': LENGTH,
        'tie_word_embeddings': False,
    }


class Timed:
    """A function that takes a state and gives the next one, and the times of its calls in milliseconds."""

    def __init__(self, call: Callable[[Any], Any], state: Any) -> None:
        self._call, self._state = call, state
        self.wall: list[float] = []
        self.thread: list[float] = []

    def several(self, count: int) -> None:
        """So many calls on end, after some that are not counted."""
        for _ in range(WARM):
            self.once()
        del self.wall[-WARM:], self.thread[-WARM:]
        for _ in range(count):
            self.once()

    def once(self) -> None:
        """One call; the wait for its result comes after the clock has stopped."""
        wall, thread = time.perf_counter(), time.thread_time()
        self._state = self._call(self._state)
        self.thread.append(1e3 * (time.thread_time() - thread))
        self.wall.append(1e3 * (time.perf_counter() - wall))
        jax.block_until_ready(self._state)


def plain(arrays: list[jax.Array]) -> Timed:
    """The floor: a jitted function that gives its arrays back, with nothing to flatten."""
    jitted = jax.jit(lambda *arrays: arrays, donate_argnums=tuple(range(len(arrays))))
    return Timed(lambda state: jitted(*state), [jnp.copy(array) for array in arrays])


def measure(layers: int, steps: int) -> dict[str, Any]:
    """Milliseconds and numbers of arrays (arguments) by function."""
    job, batch = random_job(stack(layers), ROWS, LENGTH, jax.devices()[:1])
    state = first_state(job)
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    stacked = [leaf for leaf in leaves if leaf.ndim and leaf.shape[0] == layers]
    rest = [leaf for leaf in leaves if not (leaf.ndim and leaf.shape[0] == layers)]
    apart = [row for leaf in stacked for row in leaf]
    runs = {
        'plain': plain([*leaves, *jax.tree.leaves(batch)]),
        'unstacked': plain([*rest, *apart]),
        'step': Timed(lambda state: job.step(state, batch)[0], state),  # last: it donates the arrays copied above
    }
    for _ in range(ROUNDS):  # a few calls on end, as in the loop: each function finds its own code and arrays in cache
        for run in runs.values():
            run.several(steps // ROUNDS)
    counts = {'plain': len(leaves) + len(batch), 'unstacked': len(rest) + len(apart)}
    counts['step'] = len(jax.tree.leaves(state)) + len(batch)
    return {
        name: {
            'median_ms': statistics.median(run.wall),
            'best_ms': min(run.wall),
            'thread_ms': statistics.median(run.thread),
            'arrays': counts[name],
        }
        for name, run in runs.items()
    }


def main() -> None:
    """Prints the medians beside the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--json', action='store_true', help='also print one line of JSON')
    given = parser.parse_args()
    found = measure(given.layers, given.steps)
    print(f'{given.layers} layers; milliseconds until the call returns, of {given.steps} calls')
    print(f'  {"":18} {"median":>8} {"best":>8} {"thread":>8} {"arrays":>8}')
    labels = {'step': 'training step', 'plain': 'plain function', 'unstacked': 'plain, layers apart'}
    for name, label in labels.items():
        row = found[name]
        times = ' '.join(f'{row[key]:8.3f}' for key in ('median_ms', 'best_ms', 'thread_ms'))
        print(f'  {label:19}{times} {row["arrays"]:8}')
    print(f'  goal               {GOAL_MS:8.3f}: {"met" if found["step"]["median_ms"] <= GOAL_MS else "missed"}')
    if given.json:
        print(json.dumps(machine() | found))


if __name__ == '__main__':
    main()
