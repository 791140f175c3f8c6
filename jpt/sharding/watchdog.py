"""Ends a process of a job that hangs, with a message that names the process at fault.

Every process writes a heartbeat file into a folder that all of them see (the workdir, where checkpoints go as well) and
reads those of the others. No clocks are compared: what counts is how long ago *this* process saw a file change. The
main thread says what it begins with `beat`; a thread does the rest. Three things end a process, with EXIT_CODE:

- another process gives no sign of life for `lost_after` seconds: it is dead, stopped, or its host is;
- another process ended with an error, and says so;
- this process has begun nothing new for `stuck_after` seconds. Where one process is stuck, the others wait for it
  inside a collective, so all of them come to this end; the one that is behind is named.
"""

import dataclasses
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, NamedTuple

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the job itself, start it again
FOLDER = 'heartbeats'
STOPPED = 128 + 15  # the exit code of a process that saved and ended because it was asked to
State = Literal['running', 'finished', 'failed']


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """What one process tells the others."""

    process: int
    host: str
    pid: int
    count: int = 0  # signs of life so far
    step: int = 0
    doing: str = 'starting'
    state: State = 'running'
    error: str = ''

    def name(self) -> str:
        return f'process {self.process} (host {self.host}, pid {self.pid})'


class Seen(NamedTuple):
    """The last heartbeat seen of a process, and when it was new, by the clock of the process that saw it."""

    heartbeat: Heartbeat
    since: float


def verdict(
    own: Heartbeat, now: float, progress: float, others: Mapping[int, Seen], lost_after: float, stuck_after: float
) -> str | None:
    """Why the job should end, None while all is well.

    progress: when this process's main thread last began something new. A process never seen has five times as long.
    `stuck_after` 0 never counts as stuck.
    """
    for seen in others.values():
        silent = now - seen.since
        last = f'last seen at step {seen.heartbeat.step}, {seen.heartbeat.doing}'
        if seen.heartbeat.state == 'failed':
            return f'{seen.heartbeat.name()} ended with an error at step {seen.heartbeat.step}: {seen.heartbeat.error}'
        if seen.heartbeat.state == 'running' and silent > lost_after * (1 if seen.heartbeat.count else 5):
            return f'{seen.heartbeat.name()} has given no sign of life for {silent:.0f} s ({last}): dead or stopped'
    still = now - progress
    if not stuck_after or still <= stuck_after:
        return None
    everyone = [own, *(seen.heartbeat for seen in others.values())]
    behind = min(heartbeat.step for heartbeat in everyone)
    late = [heartbeat for heartbeat in everyone if heartbeat.step == behind]
    if len(late) == len(everyone):
        doing = ', '.join(f'process {heartbeat.process}: {heartbeat.doing}' for heartbeat in everyone)
        return f'no progress for {still:.0f} s, all processes are at step {behind} ({doing})'
    names = ' and '.join(f'{heartbeat.name()} at step {behind}, {heartbeat.doing}' for heartbeat in late)
    ahead = max(heartbeat.step for heartbeat in everyone)
    return f'no progress for {still:.0f} s: {names}, is behind, while others reached step {ahead}'


class Watchdog:
    """A context around a training loop; `beat` is called at every step, and before anything that takes long.

    The job ends within `lost_after`, or `stuck_after`, and two intervals after the fault.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        process: int,
        num_processes: int,
        *,
        lost_after: float = 60.0,
        stuck_after: float = 1800.0,
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder = pathlib.Path(workdir) / FOLDER
        self.own = Heartbeat(process, socket.gethostname(), os.getpid())
        self.lost_after, self.stuck_after, self.end, self.clock = lost_after, stuck_after, end, clock
        self.interval = min(5.0, lost_after / 4, stuck_after / 4 or 5.0)
        self.progress = self.looked = clock()
        others = [other for other in range(num_processes) if other != process]
        self.others = {other: Seen(Heartbeat(other, 'unknown', 0), self.progress) for other in others}
        self.left_over = {other: self._read(other) for other in others}  # files of an earlier run say nothing
        self.lock, self.writing = threading.Lock(), threading.Lock()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def __enter__(self) -> 'Watchdog':
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(self.own.process).unlink(missing_ok=True)  # of an earlier run
        self._publish()
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tells the others how this process ended.

        After an error the watch goes on: the way out may hang as well, above all where the error is another process's
        death as it looks from here.
        """
        over = error is None or (isinstance(error, SystemExit) and error.code in (None, 0, STOPPED))
        if over or not self.others:  # alone, nobody waits for this process: it may start another run
            self._publish('finished' if over else 'failed', '' if over else f'{type(error).__name__}: {error}'[:2000])
            self.closing.set()
            self.thread.join()
        else:
            self._publish('failed', f'{type(error).__name__}: {error}'[:2000])

    def beat(self, step: int, doing: str = 'step') -> None:
        """Says that the main thread now begins something new; costs no input or output."""
        with self.lock:
            self.own = dataclasses.replace(self.own, step=step, doing=doing)
            self.progress = self.clock()

    def _watch(self) -> None:
        while not self.closing.wait(self.interval):
            # Fires from C if this thread itself cannot run, for instance behind a call that holds the interpreter lock.
            if self.stuck_after:
                faulthandler.dump_traceback_later(2 * self.stuck_after + self.interval, exit=True)
            self._publish()
            message = self._look()
            if message is not None:
                self._stop(message)
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> str | None:
        now = self.clock()
        asleep = now - self.looked - self.interval
        self.looked = now
        if asleep > self.interval:
            self._forgive(asleep, now)
        for other, before in self.others.items():
            heartbeat = self._read(other)
            if heartbeat is not None and heartbeat not in (before.heartbeat, self.left_over[other]):
                self.others[other] = Seen(heartbeat, now)
        with self.lock:
            return verdict(self.own, now, self.progress, self.others, self.lost_after, self.stuck_after)

    def _forgive(self, seconds: float, now: float) -> None:
        """Leaves out a time in which this thread itself did not run: a whole machine may have been suspended.

        The main thread may have moved since it woke up, and what it began is never in the future.
        """
        self.others = {
            other: seen._replace(since=min(now, seen.since + seconds)) for other, seen in self.others.items()
        }
        with self.lock:
            self.progress = min(now, self.progress + seconds)

    def _stop(self, message: str) -> None:
        text = f'watchdog: {message}; ending process {self.own.process} with exit code {EXIT_CODE}'
        print(text, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self.own.state == 'running':
            self._publish('failed', message)
        sys.stderr.flush()
        self.closing.set()
        self.end(EXIT_CODE)

    def _path(self, process: int) -> pathlib.Path:
        return self.folder / f'process_{process}.json'

    def _publish(self, state: State | None = None, error: str = '') -> None:
        with self.lock:
            self.own = dataclasses.replace(
                self.own, count=self.own.count + 1, state=state or self.own.state, error=error or self.own.error
            )
            own = self.own
        path = self._path(own.process)
        fresh = path.with_suffix('.new')
        with self.writing:  # a lock of its own: `beat` never waits for a file system
            fresh.write_text(json.dumps(dataclasses.asdict(own)))
            fresh.replace(path)

    def _read(self, process: int) -> Heartbeat | None:
        try:
            return Heartbeat(**json.loads(self._path(process).read_text()))
        except (OSError, ValueError):  # not there yet, or being replaced on a network file system
            return None
