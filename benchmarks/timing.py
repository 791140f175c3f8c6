"""Time of functions that are called in turn, so that whatever else the machine does meets all of them."""

import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Shortest time of a call in milliseconds: on the clock, and of all the process's threads together."""

    wall_ms: float
    cpu_ms: float


def in_turn(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Calls every function once to compile it, then all of them in turn, `repeats` times; the best of each."""
    for run in runs.values():
        jax.block_until_ready(run())
    best = {name: Timing(float('inf'), float('inf')) for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            now = Timing(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))
            best[name] = Timing(*map(min, best[name], now))
    return best


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {'device': device.device_kind, 'platform': platform.platform(), 'jax': jax.__version__}
