"""A profiler trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Trace:
    """Records the steps first to last (counted from 1, both included) under a folder; nothing where steps is None.

    A run that resumes after the first begins to record at once; one that ends early keeps what it has.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        self._steps, self._folder, self._running = steps, folder, False
        self._first = 0  # the first step that is recorded

    def __enter__(self) -> 'Trace':
        return self

    def before(self, step: int) -> Any:
        """To be called before step number `step`: begins where it is time. A context manager that marks the step."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running, self._first = True, step
        return jax.profiler.StepTraceAnnotation('step', step_num=step)

    def after(self, step: int, results: Any) -> str | None:
        """To be called after it: waits for the last step's results, ends the trace, and says where it is."""
        if not self._running or self._steps is None or step < self._steps[1]:
            return None
        jax.block_until_ready(results)
        self._stop()
        return f'profiler trace of steps {self._first} to {step}: tensorboard --logdir={self._folder}, or Perfetto'

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
