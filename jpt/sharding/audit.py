"""What a compiled program sends between devices: every collective, how often, how many bytes, among how many."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
BYTES |= {'s64': 8, 'u64': 8, 'f64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 'c64': 8}


class Collective(NamedTuple):
    """One collective operation; `bytes` is its result on one device, `times` how often a step runs it."""

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    group: int  # devices that take part together
    times: int


class _Computation(NamedTuple):
    collectives: list[Collective]
    calls: list[tuple[str, int]]  # name of another computation, how often it is run


def collectives(hlo: str) -> list[Collective]:
    """All collectives of an optimized HLO module, those within loops with their number of trips.

    A loop whose trip count XLA does not state counts once.
    """
    computations, entry = _parse(hlo)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        computation = computations.get(name)
        if computation is None:
            return
        found.extend(item._replace(times=item.times * times) for item in computation.collectives)
        for callee, trips in computation.calls:
            visit(callee, times * trips)

    visit(entry, 1)
    return found


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = '', ''
    for line in hlo.splitlines():
        head = re.match(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{?$|^(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if not line.startswith((' ', '}')) and line.rstrip().endswith('{') and head:
            current = head[2] or head[4]
            computations[current] = _Computation([], [])
            if line.startswith('ENTRY'):
                entry = current
        elif current and line.startswith(' '):
            _read_line(line, computations[current])
    return computations, entry


def _read_line(line: str, computation: _Computation) -> None:
    _, _, right = line.partition(' = ')
    operation = re.match(r'(\(.*?\)|\S+) ([\w\-]+)\(', right)
    if operation is None:
        return
    kind = operation[2].removesuffix('-start')
    if kind in KINDS:
        computation.collectives.append(_collective(kind, operation[1], operation[2].endswith('-start'), right))
    trips = re.search(r'known_trip_count\D*(\d+)', right)
    for key, name in re.findall(r'(body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)', right):
        computation.calls.append((name, int(trips[1]) if trips and key == 'body' else 1))
    for names in re.findall(r'branch_computations=\{([^}]*)\}', right):
        computation.calls.extend((name.strip().lstrip('%'), 1) for name in names.split(','))


def _collective(kind: str, result: str, started: bool, right: str) -> Collective:
    parts = list(_arrays(result))
    if started and kind in ('all-gather', 'collective-permute', 'all-reduce') and result.startswith('((') is False:
        # The result of a start operation lists operands first, then results (an all-reduce: results only).
        parts = parts if kind == 'all-reduce' else parts[len(parts) // 2 :]
        if kind == 'collective-permute':
            parts = parts[:1]
    elif started and kind != 'all-reduce':
        parts = parts[len(parts) // 2 :]
    size = sum(BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in parts)
    dtypes = sorted({dtype for dtype, _ in parts})
    return Collective(kind, '+'.join(dtypes), tuple(shape for _, shape in parts), size, _group_size(right), 1)


def _arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, dims in re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', text):
        if dtype in BYTES:
            yield dtype, tuple(int(part) for part in dims.split(',') if part)


def _group_size(right: str) -> int:
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', right)
    if listed:
        return len(listed[1].split(','))
    iota = re.search(r'replica_groups=\[\d+,(\d+)\]', right)
    if iota:
        return int(iota[1])
    mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', right)
    if mesh:
        sizes = dict(part.split('=') for part in mesh[1].split(','))
        return math.prod(int(sizes[axis.strip()]) for axis in mesh[2].split(','))
    return 2  # a permutation: each device sends to one other


def table(found: list[Collective]) -> str:
    """The collectives summed by kind, dtype and group, largest traffic first."""
    sums: dict[tuple[str, str, int], list[int]] = {}
    for item in found:
        row = sums.setdefault((item.kind, item.dtype, item.group), [0, 0])
        row[0] += item.times
        row[1] += item.times * item.bytes
    lines = [f'  {"collective":20} {"dtype":10} {"among":>6} {"times":>7} {"MiB":>12}']
    for (kind, dtype, group), (times, size) in sorted(sums.items(), key=lambda row: -row[1][1]):
        lines.append(f'  {kind:20} {dtype:10} {group:6} {times:7,} {size / 2**20:12,.2f}')
    return '\n'.join(lines)


def sent_bytes(found: list[Collective]) -> float:
    """Bytes that each device sends in a step, for ring algorithms."""
    total = 0.0
    for item in found:
        share = (item.group - 1) / item.group
        factor: dict[str, Any] = {'all-reduce': 2 * share, 'reduce-scatter': item.group - 1, 'collective-permute': 1.0}
        total += item.times * item.bytes * factor.get(item.kind, share)
    return total
