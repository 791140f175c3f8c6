"""The 1F1B timetable as plain tables: which microbatch and chunk each device runs forward and backward at each tick."""

import functools
from typing import NamedTuple

import numpy as np


class Work(NamedTuple):
    """One direction of the timetable; int [ticks, pipe], -1 where a device is idle."""

    micro: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray  # place in the ring buffer of stage inputs: written when forward runs, read when backward runs


class Rows(NamedTuple):
    """A pipeline step in lock step. Within a tick: embed, forward, head, backward, embed's backward, exchange.

    The ends of the model run on all devices together, so they have one entry per tick: [ticks], -1 for none.
    """

    forward: Work
    backward: Work
    embed: np.ndarray  # the microbatch that enters the first stage
    head: np.ndarray  # the microbatch that leaves the last stage, and whose backward begins
    leave: np.ndarray  # the microbatch whose cotangent reaches the embedding


class Timetable(NamedTuple):
    """All ticks of a step, and how many stage inputs the fullest device holds at once."""

    rows: Rows
    num_slots: int


@functools.cache
def timetable(pipe: int, chunks: int, num_microbatches: int) -> Timetable:
    """1F1B with `chunks` interleaved virtual stages per device (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Microbatches go in groups of `pipe`; a group passes chunk 0 of all devices, then chunk 1, and so on, without a gap:
    device i runs microbatch m = g * pipe + r of chunk c forward at tick (g * chunks + c) * pipe + r + i. Backward is
    the mirror image, begun at the tick in which the first microbatch leaves the last stage.
    """
    groups = -(-num_microbatches // pipe)
    stages = pipe * chunks
    ticks = groups * stages + stages + pipe - 2
    forward, backward = (np.full((2, ticks, pipe), -1) for _ in range(2))
    for micro in range(num_microbatches):
        group, place = divmod(micro, pipe)
        for chunk in range(chunks):
            for device in range(pipe):
                ahead = (group * chunks + chunk) * pipe + place + device
                mirrored = (group * chunks + chunks - 1 - chunk) * pipe + place + pipe - 1 - device
                forward[:, ahead, device] = micro, chunk
                backward[:, stages - 1 + mirrored, device] = micro, chunk
    write, read, num_slots = _slots(forward, backward)
    last = backward.shape[1] - (backward[0] >= 0).any(axis=1)[::-1].argmax()  # an incomplete group ends earlier
    ahead_work = Work(*(table[:last] for table in (*forward, write)))
    back_work = Work(*(table[:last] for table in (*backward, read)))
    rows = Rows(
        forward=ahead_work,
        backward=back_work,
        embed=np.where(ahead_work.chunk[:, 0] == 0, ahead_work.micro[:, 0], -1),
        head=np.where(ahead_work.chunk[:, -1] == chunks - 1, ahead_work.micro[:, -1], -1),
        leave=np.where(back_work.chunk[:, 0] == 0, back_work.micro[:, 0], -1),
    )
    return Timetable(rows, num_slots)


def _slots(forward: np.ndarray, backward: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Ring-buffer places, the lowest free one at each forward; the backward that reads a place frees it."""
    ticks, pipe = forward.shape[1:]
    write, read = np.full((ticks, pipe), -1), np.full((ticks, pipe), -1)
    num_slots = 0
    for device in range(pipe):
        held: dict[tuple[int, int], int] = {}
        for tick in range(ticks):
            if forward[0, tick, device] >= 0:
                taken = set(held.values())
                slot = next(place for place in range(len(taken) + 1) if place not in taken)
                held[tuple(forward[:, tick, device])] = write[tick, device] = slot
                num_slots = max(num_slots, slot + 1)
            if backward[0, tick, device] >= 0:
                read[tick, device] = held.pop(tuple(backward[:, tick, device]))
    return write, read, num_slots


class Waste(NamedTuple):
    """What a pipeline step costs beyond the work itself, in units of one chunk of layers."""

    ticks: int
    busy: int  # forward and backward runs of a device, of 2 * ticks places
    idle: float  # share of the step in which a device waits, a tick lasting as long as its longest device
    lockstep_idle: float  # the same if bubbles were computed instead of skipped


def waste(pipe: int, chunks: int, num_microbatches: int, backward_cost: float = 3.0) -> Waste:
    """Idle share of the timetable; backward (with its recompute) costs `backward_cost` times forward.

    For microbatches in whole groups the idle share is (pipe - 1) / (chunks * microbatches + pipe - 1).
    """
    rows = timetable(pipe, chunks, num_microbatches).rows
    ahead, back = rows.forward.micro >= 0, rows.backward.micro >= 0
    length = float(ahead.any(axis=1).sum() + backward_cost * back.any(axis=1).sum())
    work = num_microbatches * chunks * (1 + backward_cost)
    ticks = len(ahead)
    return Waste(ticks, 2 * num_microbatches * chunks, 1 - work / length, 1 - work / (ticks * (1 + backward_cost)))
