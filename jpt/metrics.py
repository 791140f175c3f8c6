"""Metrics of a run: sums and counts from the device, one step late, with throughput, memory and where the time went."""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jpt.training.console import Console, duration
from jpt.training.flops import mfu
from jpt.training.writers import JsonLines, TensorBoard, WeightsAndBiases, Writer

Sums = Mapping[str, tuple[Any, Any]]
Window = Mapping[str, Sequence[float]]  # (sum, count) by name, JSON


@dataclasses.dataclass(frozen=True)
class Run:
    """What the rates of a run are computed from."""

    total_steps: int
    tokens_per_step: int  # positions of the batch, padding included
    flops_per_token: float
    devices: int
    device_kind: str
    log_every: int
    first_step: int = 0  # steps that were taken before, where a run resumes


class Metrics:
    """Collects what the step returns and writes a row every `log_every` steps.

    The metrics of a step are fetched when the next one is handed in, so that the device never waits for the host.
    Values of a row are sum / count over the steps since the last row. Time is split into what `timed` measured and the
    rest, which is the step; tokens per second and MFU leave out evaluation and checkpoints, the time left does not.
    """

    def __init__(
        self,
        run: Run,
        writers: Sequence[Writer],
        clock: Callable[[], float] = time.perf_counter,
        window: Window | None = None,
    ) -> None:
        self._run, self._writers, self._clock = run, writers, clock
        self._pending: tuple[int, Sums] | None = None
        self._last_written = run.first_step
        self._window: dict[str, tuple[float, float]] = {}
        self._reset()
        self._window |= {name: (pair[0], pair[1]) for name, pair in (window or {}).items()}

    def window(self) -> Window:
        """What has been added up since the last row. A run that resumes with it writes the row that it would have."""
        return {name: list(pair) for name, pair in self._window.items()}

    def push(self, step: int, sums: Sums) -> dict[str, float] | None:
        """Takes the device values of step number `step` (from 1) and returns those of the one before as numbers."""
        for leaf in jax.tree.leaves(sums):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        values = self.flush()
        self._pending = step, sums
        return values

    def flush(self) -> dict[str, float] | None:
        """Waits for the step handed in last and returns its values, None where there is none."""
        if self._pending is None:
            return None
        (step, sums), self._pending = self._pending, None
        fetched = {name: (float(total), float(count)) for name, (total, count) in jax.device_get(dict(sums)).items()}
        for name, (total, count) in fetched.items():
            before = self._window.get(name, (0.0, 0.0))
            self._window[name] = before[0] + total, before[1] + count
        if step % self._run.log_every == 0 or step == self._run.total_steps:
            self._write_window(step)
        return _means(fetched)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a row of its own (an evaluation), with the tokens seen so far."""
        row = {'tokens': float(step * self._run.tokens_per_step), **values}
        for writer in self._writers:
            writer.write(step, row)

    def say(self, message: str) -> None:
        """A message for the console."""
        for writer in self._writers:
            if isinstance(writer, Console):
                writer.say(message)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the time spent inside as that of `part` ('data', 'checkpoint', 'eval')."""
        start = self._clock()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + self._clock() - start

    @contextlib.contextmanager
    def compiling(self, what: str = 'the training step', steps: int = 1) -> Iterator[None]:
        """Announces a compilation, says how long it took, and leaves it and the `steps` run inside out of the rates."""
        self.say(f'compiling {what} (once; later runs find it in the compilation cache)')
        start = self._clock()
        yield
        elapsed = self._clock() - start
        self.say(f'compiled {what} in {duration(elapsed)}')
        self._start += elapsed
        self._uncounted += steps

    def close(self) -> None:
        """Writes what is pending and closes the writers."""
        self.flush()
        for writer in self._writers:
            writer.close()

    def _write_window(self, step: int) -> None:
        seconds = max(self._clock() - self._start, 1e-9)
        row = _means(self._window) | {
            'tokens': float(step * self._run.tokens_per_step),
            'memory_gib': peak_memory() / 2**30,
            'seconds_step': seconds - sum(self._spent.values()),
        }
        row |= {f'seconds_{part}': spent for part, spent in self._spent.items()}
        row |= self._rates(step, seconds)
        for writer in self._writers:
            writer.write(step, row)
        self._last_written = step
        self._reset()

    def _rates(self, step: int, seconds: float) -> dict[str, float]:
        """Speed and time left; nothing where the only step of the row was the one that compiled."""
        run = self._run
        steps = step - self._last_written - self._uncounted
        if steps < 1:
            return {}
        training = max(seconds - self._spent.get('eval', 0.0) - self._spent.get('checkpoint', 0.0), 1e-9)
        rates = {
            'tokens_per_second': steps * run.tokens_per_step / training,
            'seconds_per_step': seconds / steps,
            'eta_seconds': (run.total_steps - step) * seconds / steps,
        }
        utilization = mfu(run.flops_per_token, rates['tokens_per_second'], run.devices, run.device_kind)
        return rates if utilization is None else rates | {'mfu': utilization}

    def _reset(self) -> None:
        self._uncounted = 0
        self._window = {}
        self._spent: dict[str, float] = {}
        self._start = self._clock()


def make_writers(
    workdir: Path,
    total_steps: int,
    last_step: int,
    *,
    tensorboard: bool = False,
    wandb_project: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Writer]:
    """The writers that a run asks for; none but on process 0. `last_step` is what the run resumes from (0: nothing).

    Raises:
        ValueError: a writer was asked for whose package is not installed.
    """
    if jax.process_index() != 0:
        return []
    writers: list[Writer] = [Console(total_steps), JsonLines(workdir / 'metrics.jsonl', last_step)]
    if tensorboard:
        writers.append(TensorBoard(workdir / 'tensorboard', last_step))
    if wandb_project is not None:
        writers.append(WeightsAndBiases(wandb_project, workdir, config or {}))
    return writers


def peak_memory() -> int:
    """Bytes: the most that the first local device has held, or this process where devices do not say (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count != 0}
