"""Being asked to stop: SIGTERM and SIGINT become a flag that the loop looks at between steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """While entered, the first signal sets `asked`; the second one acts as it would have without this.

    Only the main thread can catch signals; in any other this does nothing. Nor does it where several processes are
    joined: there JAX itself catches SIGTERM, and finds a step at which all of them stop
    (`multihost_utils.reached_preemption_sync_point`); a handler of our own would take the signal away from it.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'Interrupt':
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
