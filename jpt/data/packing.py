"""Which part of which document goes into which row, decided from lengths alone.

All lengths count positions: a document of n tokens has n - 1, each with one token as input and the next as target. A
document longer than a row is cut into pieces, whose positions restart; so every target is learned exactly once and no
attention crosses a row. The plan is the same wherever it is computed, so hosts need not talk.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Positions start .. start + length of one document."""

    document: int
    start: int
    length: int


Row = list[Piece]
Lengths = Sequence[int] | np.ndarray


def cut(lengths: Lengths, seq_len: int) -> list[Piece]:
    """The documents in order, each in pieces of at most seq_len; documents of length 0 give none."""
    pieces = []
    for document, length in enumerate(lengths):
        for start in range(0, int(length), seq_len):
            pieces.append(Piece(document, start, min(seq_len, int(length) - start)))
    return pieces


def pack_best_fit(lengths: Lengths, seq_len: int) -> list[Row]:
    """Packs whole pieces into few rows: best-fit decreasing, or exact fits first where that needs fewer.

    Best-fit decreasing alone leaves 2-5 % open on documents of a third to a fifth of a row (it pairs the middle lengths
    and runs out of short ones); searching exact complements keeps the mixture of lengths as it is and closes that.
    Returns rows in the order of their first piece, the pieces of a row in the order of the documents. Never uses more
    than 11/9 of the fewest possible rows + 4 (best-fit decreasing: Johnson 1974, SIAM J. Comput. 3).
    """
    pieces = cut(lengths, seq_len)
    rows = best_fit_decreasing(pieces, seq_len)
    if sum(piece.length for piece in pieces) <= (len(rows) - 1) * seq_len:  # else no packing has fewer rows
        exact, rest = exact_fits(pieces, seq_len)
        rows = min(rows, exact + best_fit_decreasing(rest, seq_len), key=len)
    return sorted(sorted(row) for row in rows)


def cut_to_fill(rows: Sequence[Row], seq_len: int, least: float) -> list[Row]:
    """Packed rows of which at least the share `least` is filled, or as many as the tokens allow: the last row is open.

    Whole documents cannot always fill rows: at most two that are longer than a third of a row share one, and none
    shares it with one longer than two thirds, so n(1/3 .. 2/3) / 2 + n(above 2/3) rows are needed at least; the linear
    program over all ways to fill a row (Gilmore and Gomory 1961) says more. The documents of the emptiest rows are laid
    end to end and cut where a row ends; of as few rows as that takes, since each of them costs about one cut.
    """
    filled = np.array([sum(piece.length for piece in row) for row in rows], np.int64)
    total = int(filled.sum())
    most = max(-(-total // seq_len), math.floor(total / (least * seq_len))) if least > 0 else len(rows)
    if len(rows) <= most:
        return list(rows)
    order = np.argsort(filled, kind='stable')
    emptied = np.cumsum(filled[order])
    after = len(rows) - np.arange(1, len(rows) + 1) + -(-emptied // seq_len)  # rows that there are in the end
    count = int(np.argmax(after <= most)) + 1
    joined = end_to_end(sorted(piece for i in order[:count] for piece in rows[i]), seq_len)
    return sorted([*(rows[i] for i in order[count:]), *joined])


def pack_concat(lengths: Lengths, seq_len: int) -> list[Row]:
    """All documents one after another, cut every seq_len positions: every row but the last one is full."""
    return end_to_end((Piece(document, 0, int(length)) for document, length in enumerate(lengths)), seq_len)


def end_to_end(pieces: Iterable[Piece], seq_len: int) -> list[Row]:
    """Pieces one after another, cut where a row ends."""
    rows: list[Row] = []
    free = 0
    for document, start, length in pieces:
        end = start + length
        while start < end:
            if not free:
                rows.append([])
                free = seq_len
            taken = min(free, end - start)
            rows[-1].append(Piece(document, start, taken))
            start, free = start + taken, free - taken
    return rows


def pack_none(lengths: Lengths, seq_len: int) -> list[Row]:
    """Every piece in a row of its own."""
    return [[piece] for piece in cut(lengths, seq_len)]


PACKINGS = {'best_fit': pack_best_fit, 'concat': pack_concat, 'none': pack_none}


def best_fit_decreasing(pieces: Iterable[Piece], seq_len: int) -> list[Row]:
    """The longest piece first, each into the fullest row that has room for it."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (free positions, row), sorted; only rows that are not full
    for piece in sorted(pieces, key=lambda piece: -piece.length):  # sorted is stable: equal lengths keep their order
        found = bisect.bisect_left(room, (piece.length, -1))
        if found < len(room):
            free, row = room.pop(found)
            rows[row].append(piece)
        else:
            free, row = seq_len, len(rows)
            rows.append([piece])
        if free > piece.length:
            bisect.insort(room, (free - piece.length, row))
    return rows


def exact_fits(pieces: Sequence[Piece], seq_len: int) -> tuple[list[Row], list[Piece]]:
    """Rows that are exactly full, and the pieces for which none was found.

    Piece by piece in the given order, each is completed by the lengths that are most plentiful.
    """
    stock: list[list[Piece]] = [[] for _ in range(seq_len + 1)]
    for piece in reversed(pieces):
        stock[piece.length].append(piece)
    have = np.array([len(equal) for equal in stock])
    mean = sum(piece.length for piece in pieces) / max(len(pieces), 1)
    rows: list[Row] = []
    rest: list[Piece] = []
    for piece in pieces:
        if not stock[piece.length] or stock[piece.length][-1] is not piece:
            continue  # used in an earlier row: equal lengths are used in order
        have[piece.length] -= 1
        lengths = [piece.length, *_complement(have, seq_len - piece.length, mean)]
        if sum(lengths) == seq_len:
            rows.append([stock[length].pop() for length in lengths])
        else:
            rest.append(stock[piece.length].pop())
    return rows, rest


_CANDIDATES = 24  # how many lengths are tried as the third before last


def _complement(have: np.ndarray, room: int, mean: float) -> list[int]:
    """Lengths from the stock that fill `room` exactly, taken out of `have`; or [], and `have` as before."""
    taken: list[int] = []
    while room:
        if have[room]:
            last = [room]
        elif room < 3 * mean and (pair := _pair(have, room)):
            last = pair
        else:
            plenty = np.argsort(-have[:room], kind='stable')[:_CANDIDATES]
            plenty = plenty[have[plenty] > 0]
            if not len(plenty):
                break
            if room > 4 * mean:  # far from full: just go on with the most common length
                last = [int(plenty[0])]
            else:
                last = _triple(have, room, plenty)
                if not last:
                    break
        for length in last:
            have[length] -= 1
        taken += last
        room -= sum(last)
    if room:
        for length in taken:
            have[length] += 1
        return []
    return taken


def _pair(have: np.ndarray, room: int) -> list[int]:
    """The two lengths of sum `room` of which there are most, or []."""
    if room < 2:
        return []
    both = np.minimum(have[1:room], have[1:room][::-1])
    if room % 2 == 0:
        both[room // 2 - 1] //= 2
    first = int(both.argmax()) + 1
    return [first, room - first] if both[first - 1] > 0 else []


def _triple(have: np.ndarray, room: int, candidates: np.ndarray) -> list[int]:
    for length in candidates:
        have[length] -= 1
        pair = _pair(have, room - int(length))
        have[length] += 1
        if pair:
            return [int(length), *pair]
    return []


def fill(rows: Sequence[Row], seq_len: int) -> float:
    """The share of positions that hold a document; 1.0 of no rows."""
    return sum(piece.length for row in rows for piece in row) / (len(rows) * seq_len) if rows else 1.0
