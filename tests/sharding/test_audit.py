"""Reading collectives out of compiled programs: hand-written modules with known counts."""

import pytest

from jpt.sharding.audit import axes_of, collectives, sent_bytes, summed, table

MODULE = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %g = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %ag = bf16[16,4]{1,0} all-gather(%g), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %cp = f32[8,4]{1,0} collective-permute(%g), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%p, %g)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%idle (q: f32[8,4]) -> f32[8,4] {
  ROOT %q = f32[8,4]{1,0} parameter(0)
}

%work (r: f32[8,4]) -> f32[8,4] {
  %r = f32[8,4]{1,0} parameter(0)
  ROOT %aa = f32[8,4]{1,0} all-to-all(%r), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[8,4]{1,0} conditional(%i, %a, %a), branch_computations={%idle, %work, %work}
  %ar = f32[8,4]{1,0} all-reduce-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %m = f32[100]{0} all-reduce-start(%a), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %d = f32[8,4]{1,0} all-reduce-done(%ar)
  %md = f32[100]{0} all-reduce-done(%m)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%d), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}
"""


def test_kinds_bytes_groups_and_trips():
    found = {(item.kind, item.shapes): item for item in collectives(MODULE)}
    gather = found['all-gather', ((16, 4),)]
    assert (gather.dtype, gather.bytes, gather.group, gather.times) == ('bf16', 128, 2, 3)
    permute = found['collective-permute', ((8, 4),)]
    assert (permute.bytes, permute.times) == (128, 3)
    reduce = found['all-reduce', ((8, 4),)]
    assert (reduce.dtype, reduce.bytes, reduce.group, reduce.times) == ('f32', 128, 4, 1)
    assert found['all-reduce', ((100,),)].group == 4
    scatter = found['reduce-scatter', ((2, 4),)]
    assert (scatter.bytes, scatter.group) == (32, 4)
    exchange = found['all-to-all', ((8, 4),)]
    assert (exchange.bytes, exchange.group, exchange.times) == (128, 4, 1), 'one branch of a conditional is run'
    assert len(found) == 6


# What starts lists operands, results or both, and more; with the kind, what it ends in, and the bytes of that.
UNDER_WAY = [
    ('all-reduce', 'f32[8]{0}', 'f32[8]{0}', 32),
    ('all-reduce', '((f32[8]{0}), f32[8]{0})', 'f32[8]{0}', 32),
    ('all-reduce', '((f32[8]{0}, f32[4]{0}), (f32[8]{0}, f32[4]{0}))', '(f32[8]{0}, /*index=1*/f32[4]{0})', 48),
    ('all-gather', '(bf16[8]{0}, bf16[16]{0})', 'bf16[16]{0}', 32),
    ('reduce-scatter', '((f32[8]{0}), (f32[4]{0}))', '(f32[4]{0})', 16),
    ('collective-permute', '(f32[8]{0}, f32[8]{0}, u32[], u32[])', 'f32[8]{0}', 32),
    ('ragged-all-to-all', '((bf16[6]{0}, bf16[9]{0}, s64[4]{0}, s64[4]{0}), bf16[9]{0})', 'bf16[9]{0}', 18),
]


@pytest.mark.parametrize(('kind', 'start', 'result', 'size'), UNDER_WAY)
def test_what_is_under_way_counts_once_by_its_result(kind, start, result, size):
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %x-start.1 = {start} {kind}-start(%a), replica_groups=[2,4]<=[8]
  %b = f32[8]{{0}} copy(%a)
  ROOT %x-done.1 = {result} {kind}-done(%x-start.1), frontend_attributes={{more="%a"}}
}}
"""
    (found,) = collectives(text)
    assert (found.kind, found.bytes, found.group) == (kind, size, 4)


def test_an_end_without_its_start_is_an_error():
    text = """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} all-reduce-done(%a)
}
"""
    with pytest.raises(ValueError, match='expected the all-reduce-start that it ends'):
        collectives(text)


COUNTED = """HloModule jit_step, is_scheduled=true

%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %g = f32[8]{0} get-tuple-element(%p), index=0
  %ag = f32[16]{0} all-gather(%g), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %t = (f32[8]{0}, s32[]) tuple(%g, %g)
}

%below (q: s32[]) -> pred[] {
  %q = s32[] parameter(0)
  %end = s32[] constant(7)
  ROOT %lt = pred[] compare(%q, %end), direction=LT
}

%fused (p: (f32[8], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%below
}

%plain (p: (f32[8], s32[])) -> pred[] {
  %p = (f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=1
  %end = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (a: f32[8], n: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %one = s32[] constant(1)
  %two = s32[] copy(%one)
  %first = (f32[8]{0}, s32[]) tuple(%a, %two)
  %second = (f32[8]{0}, s32[]) tuple(%a, %n)
  ROOT %w = (f32[8]{0}, s32[]) while(BEGIN), condition=%COND, body=%body
}
"""


@pytest.mark.parametrize(
    ('begin', 'condition', 'trips'),
    [('first', 'fused', 6), ('first', 'plain', 4), ('second', 'plain', 1)],  # n may be anything
)
def test_trips_that_are_not_stated_are_counted(begin, condition, trips):
    (found,) = collectives(COUNTED.replace('BEGIN', f'%{begin}').replace('COND', condition))
    assert found.times == trips


def test_groups_are_named_by_the_axes_of_the_mesh():
    """Device d of a mesh data=2, fsdp=2, tensor=2 is 4 data + 2 fsdp + tensor."""
    axes = {(row.kind, row.group): row.axes for row in summed(collectives(MODULE), {'data': 2, 'fsdp': 2, 'tensor': 2})}
    assert axes['all-gather', 2] == 'tensor'  # [4,2]<=[8]: 0 and 1
    assert axes['all-reduce', 4] == 'fsdp+tensor'  # 0, 1, 2, 3
    assert axes['all-to-all', 4] == 'data+fsdp'  # [2,4]<=[4,2]T(1,0): 0, 2, 4, 6
    assert axes['collective-permute', 2] == 'tensor'  # from 0 to 1


@pytest.mark.parametrize(
    ('groups', 'expected'),
    [
        ('{{0,2},{1,3}}', (0, 2)),
        ('[2,4]<=[8]', (0, 1, 2, 3)),
        ('[4,2]<=[2,4]T(1,0)', (0, 4)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", (0, 4)),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", (0, 3)),
    ],
)
def test_every_form_of_groups_is_read(groups, expected):
    """The forms of XLA's printer; the first group of each, worked out by hand."""
    line = f'  ROOT %a = f32[2]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add'
    (found,) = collectives(f'ENTRY %main (x: f32[2]) -> f32[2] {{\n{line}\n}}\n')
    assert found.members == expected


@pytest.mark.parametrize(
    ('members', 'expected'), [((0,), ''), ((0, 4), 'data'), ((1, 3), 'fsdp'), ((0, 6), 'data+fsdp'), ((2, 3), 'tensor')]
)
def test_axes_along_which_devices_differ(members, expected):
    assert axes_of(members, {'data': 2, 'fsdp': 2, 'tensor': 2}) == expected


def test_bytes_that_a_ring_sends():
    """All-reduce 2 (n-1)/n of its size, gather and to-all (n-1)/n, scatter (n-1) times its result, permute its size."""
    expected = 2 * 0.75 * (128 + 400) + 3 * 0.5 * 128 + 3 * 32 + 3 * 128 + 0.75 * 128
    assert sent_bytes(collectives(MODULE)) == expected


def test_table_adds_up():
    lines = table(collectives(MODULE), {'data': 2, 'tensor': 4}).splitlines()
    assert len(lines) == 6  # head, two reductions in one row, gather, permute, scatter, all-to-all
    assert ['all-gather', 'bf16', 'tensor', '2', '3', '0.00'] in [line.split() for line in lines]
