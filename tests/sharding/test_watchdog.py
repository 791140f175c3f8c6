import json
import threading

import pytest

from jpt.sharding.watchdog import EXIT_CODE, FOLDER, Heartbeat, Seen, Watchdog, verdict

OWN = Heartbeat(0, 'here', 10, count=5, step=7)
OTHER = Heartbeat(1, 'there', 20, count=5, step=7)


def judge(now, *others, own=OWN, progress=0.0, stuck_after=100.0):
    seen = {heartbeat.process: Seen(heartbeat, since) for heartbeat, since in others}
    return verdict(own, now, progress, seen, lost_after=10.0, stuck_after=stuck_after)


def with_(heartbeat, **changes):
    return Heartbeat(**{**heartbeat.__dict__, **changes})


def test_all_is_well_while_everyone_is_heard_and_moves():
    assert judge(50.0, (OTHER, 45.0)) is None
    assert judge(50.0, (OTHER, 40.0)) is None


def test_a_silent_process_is_named():
    message = judge(50.0, (OTHER, 39.0), (with_(OTHER, process=2), 49.0))
    assert 'process 1 (host there, pid 20)' in message
    assert 'no sign of life for 11 s' in message
    assert 'step 7' in message


def test_a_process_that_was_never_seen_has_longer():
    unseen = Heartbeat(1, 'unknown', 0)
    assert judge(49.0, (unseen, 0.0)) is None
    assert 'process 1' in judge(51.0, (unseen, 0.0))


def test_a_process_that_failed_is_quoted_at_once():
    failed = with_(OTHER, state='failed', error='ValueError: bad row 3')
    assert 'ValueError: bad row 3' in judge(50.0, (failed, 50.0))


def test_a_process_that_finished_may_be_silent():
    assert judge(90.0, (with_(OTHER, state='finished'), 0.0)) is None


def test_the_process_that_is_behind_is_the_one_stuck():
    behind = with_(OTHER, step=6, doing='data')
    message = judge(101.0, (behind, 100.0), (with_(OTHER, process=2), 100.0))
    assert 'process 1 (host there, pid 20) at step 6, data, is behind' in message
    assert 'others reached step 7' in message
    own = with_(OWN, step=6, doing='data')
    assert 'process 0 (host here, pid 10) at step 6, data' in judge(101.0, (OTHER, 100.0), own=own)


def test_when_all_are_level_what_each_does_is_listed():
    message = judge(101.0, (with_(OTHER, doing='checkpoint'), 100.0))
    assert 'all processes are at step 7 (process 0: starting, process 1: checkpoint)' in message


def test_zero_never_counts_as_stuck():
    assert judge(1e6, (OTHER, 1e6), stuck_after=0.0) is None


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_heartbeats_travel_by_files_and_leftovers_say_nothing(tmp_path):
    folder = tmp_path / FOLDER
    folder.mkdir()
    old = {**with_(OTHER, state='failed', error='of yesterday').__dict__}
    (folder / 'process_1.json').write_text(json.dumps(old))
    clock = Clock()
    dog = Watchdog(tmp_path, 0, 2, lost_after=10.0, stuck_after=0.0, clock=clock)
    assert dog._look() is None
    (folder / 'process_1.json').write_text(json.dumps({**OTHER.__dict__, 'step': 3}))
    assert dog._look() is None
    for clock.now in (2.0, 4.0, 6.0, 8.0, 10.0):
        assert dog._look() is None
    clock.now = 11.0
    assert 'last seen at step 3' in dog._look()
    (folder / 'process_1.json').write_text(json.dumps({**OTHER.__dict__, 'count': 6}))
    assert dog._look() is None
    (folder / 'process_1.json').write_text('{"torn')
    assert dog._look() is None


def test_a_time_in_which_the_watchdog_itself_did_not_run_says_nothing(tmp_path):
    """A machine that is suspended wakes up with a clock far ahead: nobody is blamed before another lost_after."""
    clock = Clock()
    dog = Watchdog(tmp_path, 0, 2, lost_after=10.0, stuck_after=40.0, clock=clock)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / 'process_1.json').write_text(json.dumps(OTHER.__dict__))
    assert dog._look() is None
    clock.now = 1000.0
    assert dog._look() is None
    for clock.now in (1002.0, 1004.0, 1006.0):
        assert dog._look() is None
    clock.now = 1008.5
    assert 'process 1 (host there, pid 20) has given no sign of life for 11 s' in dog._look()


def test_what_was_begun_after_a_pause_is_not_in_the_future(tmp_path):
    """The main thread wakes up and beats before the watchdog looks: 40 seconds count from that beat, not from later."""
    clock = Clock()
    dog = Watchdog(tmp_path, 0, 1, lost_after=10.0, stuck_after=40.0, clock=clock)
    assert dog._look() is None
    clock.now = 998.0
    dog.beat(3)
    clock.now = 1000.0
    assert dog._look() is None
    assert dog.progress == 1000.0
    for clock.now in range(1002, 1041, 2):
        assert dog._look() is None
    clock.now = 1042.0
    assert 'no progress for 42 s' in dog._look()


def test_the_file_says_how_a_process_ended(tmp_path):
    def read():
        return json.loads((tmp_path / FOLDER / 'process_0.json').read_text())

    with Watchdog(tmp_path, 0, 1, lost_after=60.0) as dog:
        dog.beat(4, 'checkpoint')
    assert read()['state'] == 'finished'
    assert (read()['step'], read()['doing']) == (4, 'checkpoint')
    with pytest.raises(KeyError), Watchdog(tmp_path, 0, 1, lost_after=60.0) as dog:
        raise KeyError('nothing here')
    assert (read()['state'], read()['error']) == ('failed', "KeyError: 'nothing here'")
    dog.closing.set()
    with pytest.raises(SystemExit), Watchdog(tmp_path, 0, 1, lost_after=60.0):
        raise SystemExit(0)
    assert read()['state'] == 'finished'


def test_a_stuck_main_thread_is_ended_with_the_code_and_a_message(tmp_path, capfd):
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()

    clock = Clock()
    with Watchdog(tmp_path, 0, 1, lost_after=0.1, stuck_after=30.0, end=end, clock=clock) as dog:
        dog.beat(12, 'step')
        dog.progress = -31.0  # so long ago
        assert ended.wait(30)
    assert codes == [EXIT_CODE]
    message = capfd.readouterr().err
    assert 'watchdog: no progress for 31 s, all processes are at step 12' in message
    assert f'exit code {EXIT_CODE}' in message
    assert 'test_watchdog.py' in message  # where the main thread stands
