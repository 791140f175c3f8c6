"""What a compiled program sends between devices: every collective, how often, how many bytes, among whom."""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

KINDS = (
    'all-gather',
    'all-reduce',
    'reduce-scatter',
    'all-to-all',
    'ragged-all-to-all',
    'collective-permute',
    'collective-broadcast',
)
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
BYTES |= {'s64': 8, 'u64': 8, 'f64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 'c64': 8}


class Collective(NamedTuple):
    """One collective operation; `bytes` is its result on one device, `times` how often a step runs it."""

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    members: tuple[int, ...]  # the first group of devices that take part together; of a permutation the first pair
    times: int

    @property
    def group(self) -> int:
        """How many devices take part together."""
        return len(self.members)


class _Computation(NamedTuple):
    collectives: list[Collective]
    calls: list[tuple[tuple[str, ...], int]]  # other computations, of which one is run, and how often
    values: dict[str, str]  # what stands on the right of every name; 'ROOT' is the result


class _Loop(NamedTuple):
    """Where a loop stands, as it is written; trips: as stated, or 0."""

    computation: str
    body: str
    right: str
    trips: int


def collectives(hlo: str) -> list[Collective]:
    """All collectives of an optimized HLO module, those within loops with their number of trips.

    A loop counts as often as XLA states, or as a counter from one constant to another says (of a pipelined loop, whose
    first trip stands in front of it, XLA states nothing); any other counts once. Of the branches of a conditional the
    one that sends most counts, every time: what a pipeline skips in some of its ticks is counted in all of them.
    """
    computations, entry = _parse(hlo)

    @functools.cache
    def run(name: str) -> tuple[Collective, ...]:
        computation = computations.get(name, _Computation([], [], {}))
        found = list(computation.collectives)
        for names, trips in computation.calls:
            heaviest = max(map(run, names), key=lambda items: sum(item.times * item.bytes for item in items))
            found.extend(item._replace(times=item.times * trips) for item in heaviest)
        return tuple(found)

    return list(run(entry))


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    loops: list[_Loop] = []
    entry, current = '', ''
    for line in hlo.splitlines():
        head = re.match(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{?$|^(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if not line.startswith((' ', '}')) and line.rstrip().endswith('{') and head:
            current = head[2] or head[4]
            computations[current] = _Computation([], [], {})
            if line.startswith('ENTRY'):
                entry = current
        elif current and line.startswith(' '):
            loops += _read_line(line, current, computations[current])
    for loop in loops:
        trips = loop.trips or _counted(loop, computations) or 1
        computations[loop.computation].calls.append(((loop.body,), trips))
    return computations, entry


def _read_line(line: str, name: str, computation: _Computation) -> list[_Loop]:
    """Adds what a line says to its computation; returns the loop that it is, if it is one."""
    left, _, right = line.partition(' = ')
    operation = re.match(r'(\(.*?\)|\S+) ([\w\-]+)\(', right)
    if operation is None:
        return []
    computation.values[left.split()[-1].lstrip('%')] = right
    if left.split()[0] == 'ROOT':
        computation.values['ROOT'] = right
    kind = operation[2].removesuffix('-done')
    if kind in KINDS:  # one that is under way meanwhile: what its end gives, among whom its start says
        begun = right
        if operation[2] != kind:
            begun = computation.values.get((_names(right.split('(', 1)[1]) or [''])[0], '')
            if f' {kind}-start(' not in begun:
                raise ValueError(f'{line.strip()[:200]}: expected the {kind}-start that it ends as its operand')
        computation.collectives.append(_collective(kind, operation[1], begun))
    loops = []
    trips = re.search(r'known_trip_count\D*(\d+)', right)
    for key, called in re.findall(r'(body|to_apply|calls)=%?([\w.\-]+)', right):
        if key == 'body':
            loops.append(_Loop(name, called, right, int(trips[1]) if trips else 0))
        else:
            computation.calls.append(((called,), 1))
    branches = re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', right)
    for names in re.findall(r'branch_computations=\{([^}]*)\}', right):
        branches += [each.strip().lstrip('%') for each in names.split(',')]
    if branches:
        computation.calls.append((tuple(branches), 1))
    return loops


def _counted(loop: _Loop, computations: Mapping[str, _Computation]) -> int:
    """Trips of a loop whose counter, raised by 1, goes from a constant to below another; 0 where it is none."""
    condition = re.search(r'condition=%?([\w.\-]+)', loop.right)
    values = computations[condition[1]].values if condition and condition[1] in computations else {}
    root, outer = values.get('ROOT', ''), {}
    fused = re.search(r' fusion\((.*?)\).*calls=%?([\w.\-]+)', root)
    if fused:
        outer = dict(enumerate(_names(fused[1])))
        inner = computations[fused[2]].values
        # What the fusion takes stands outside of it.
        numbers = {name: re.search(r' parameter\((\d+)\)', right) for name, right in inner.items()}
        values = {**values, **inner} | {n: values.get(outer[int(k[1])], '') for n, k in numbers.items() if k}
        root = inner.get('ROOT', '')
    compared = re.search(r' compare\((.*?)\), direction=LT', root)
    if compared is None:
        return 0
    counter, bound = (values.get(name, '') for name in _names(compared[1]))
    place, end = re.search(r'get-tuple-element\(.*index=(\d+)', counter), _constant(bound)
    given = re.search(r' while\(%?([\w.\-]+)\)', loop.right)
    before = computations[loop.computation].values
    start = re.search(r' tuple\((.*?)\)', before.get(given[1], '')) if given else None
    if place is None or end is None or start is None:
        return 0
    name = _names(start[1])[int(place[1])]
    while moved := re.search(r' (?:copy|bitcast)\(%?([\w.\-]+)\)', before.get(name, '')):
        name = moved[1]
    begin = _constant(before.get(name, ''))
    return 0 if begin is None else max(end - begin, 0)


def _names(operands: str) -> list[str]:
    return re.findall(r'%([\w.\-]+)', operands)


def _constant(right: str) -> int | None:
    found = re.search(r'^[su]\d+\[\]\S* constant\((-?\d+)\)', right)
    return int(found[1]) if found else None


def _collective(kind: str, result: str, right: str) -> Collective:
    parts = list(_arrays(result))
    size = sum(BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in parts)
    dtypes = sorted({dtype for dtype, _ in parts})
    return Collective(kind, '+'.join(dtypes), tuple(shape for _, shape in parts), size, _members(right), 1)


def _arrays(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for dtype, dims in re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', text):
        if dtype in BYTES:
            yield dtype, tuple(int(part) for part in dims.split(',') if part)


def _members(right: str) -> tuple[int, ...]:
    """The first group of devices that take part together, in each of the forms that HLO has for groups."""
    listed = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}', right)
    if listed:
        return tuple(int(part) for part in listed[1].split(','))
    iota = re.search(r'replica_groups=\[\d+,(\d+)\]<=(\S*)', right)
    if iota:
        return tuple(_iota(iota[2]).reshape(-1)[: int(iota[1])].tolist())
    mesh = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}', right)
    if mesh:
        axes = [part.split('=') for part in mesh[1].split(',')]
        sizes = [int(size) for _, size in axes]
        devices = _iota(mesh[2] or f'[{math.prod(sizes)}]').reshape(sizes)
        chosen = {axis.strip() for axis in mesh[3].split(',')}
        at = tuple(slice(None) if name.strip() in chosen else 0 for name, _ in axes)
        return tuple(devices[at].reshape(-1).tolist())
    return (0,)


def _iota(text: str) -> np.ndarray:
    """Device numbers as HLO writes them: '[2,4]T(1,0)' for 0 to 7 as [2, 4], transposed; or one by one, '0,4,1,5'."""
    found = re.match(r'\[([\d,]*)\](?:T\(([\d,]*)\))?', text)
    if found is None:
        return np.array([int(part) for part in text.split(',')])
    sizes = [int(part) for part in found[1].split(',')]
    order: Sequence[int] = [int(part) for part in found[2].split(',')] if found[2] else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(tuple(order))


def axes_of(members: tuple[int, ...], sizes: Mapping[str, int]) -> str:
    """The mesh axes along which a group of devices lies, 'data+fsdp'; sizes: of the mesh, in its order."""
    places = np.unravel_index(np.array(members), tuple(sizes.values()))
    return '+'.join(axis for axis, place in zip(sizes, places, strict=True) if len(set(place.tolist())) > 1)


class Row(NamedTuple):
    """Collectives of one kind, dtype and group of devices together."""

    kind: str
    dtype: str
    group: int
    axes: str
    times: int
    bytes: int


def summed(found: list[Collective], sizes: Mapping[str, int]) -> list[Row]:
    """The collectives summed by kind, dtype and mesh axes, largest traffic first."""
    sums: dict[tuple[str, str, int, str], list[int]] = {}
    for item in found:
        row = sums.setdefault((item.kind, item.dtype, item.group, axes_of(item.members, sizes)), [0, 0])
        row[0] += item.times
        row[1] += item.times * item.bytes
    return [Row(*key, *sums[key]) for key in sorted(sums, key=lambda key: -sums[key][1])]


def table(found: list[Collective], sizes: Mapping[str, int]) -> str:
    """`summed` as text; bytes are results on one device."""
    lines = [f'  {"collective":20} {"dtype":8} {"over":16} {"devices":>7} {"times":>7} {"MiB a step":>12}']
    for row in summed(found, sizes):
        size = f'{row.bytes / 2**20:12,.2f}'
        lines.append(f'  {row.kind:20} {row.dtype:8} {row.axes:16} {row.group:7} {row.times:7,} {size}')
    return '\n'.join(lines)


def sent_bytes(found: list[Collective]) -> float:
    """Bytes that each device sends in a step, for ring algorithms."""
    total = 0.0
    for item in found:
        share = (item.group - 1) / item.group
        factor: dict[str, Any] = {'all-reduce': 2 * share, 'reduce-scatter': item.group - 1, 'collective-permute': 1.0}
        total += item.times * item.bytes * factor.get(item.kind, share)
    return total
