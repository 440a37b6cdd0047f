"""The states of a ring: the whole table, the fields that the loop sees, and a real session that follows the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import ringplane
from ringplane.dataplane import ring_rules
from ringplane.dataplane.ring_states import (
    FIELDS,
    TRANSITIONS,
    ImpossibleEvent,
    RingEvent,
    RingState,
    RingStateMachine,
)
from ringplane.dataplane.state import QUEUE
from ringplane.driver.frontend import Refused
from ringplane.guest_memory.regions import MemoryTable
from ringplane.vhost_user.messages import Request

from .protocol_rig import Machine, break_ring, machine, sector, serve_in
from .rig import IN, PATIENCE, RigFactory, eventually, fetch_only, held, pattern, rig_factory

S, E = RingState, RingEvent
EVERY = [(state, event) for state in RingState for event in RingEvent]


def machine_in(state: RingState) -> tuple[RingStateMachine, np.void]:
    """A state machine in this state, and its record, with the fields that belong to it."""
    record = np.zeros(1, QUEUE)[0]
    states = RingStateMachine(record)
    states.state = state
    record["running"], record["draining"] = FIELDS[state]
    record["broken"] = ring_rules.LOOP if state.broken else ring_rules.OK
    return states, record


def fields(record: np.void) -> tuple[int, int]:
    return int(record["running"]), int(record["draining"])


# The table.


@pytest.mark.parametrize(("state", "event"), EVERY, ids=lambda each: each.name)
def test_each_event_in_each_state(state: RingState, event: RingEvent) -> None:
    """It leads where the table says, and the fields follow; an event that the table does not have changes nothing."""
    states, record = machine_in(state)
    before = record.copy()
    if event not in TRANSITIONS[state]:
        with pytest.raises(ImpossibleEvent, match=f"{event.name} of a ring that is {state.value}"):
            states.apply(event)
        assert (states.state, record) == (state, before)
        return
    assert states.check(event) is TRANSITIONS[state][event]
    assert states.state is state
    following = states.apply(event)
    assert states.state is following is TRANSITIONS[state][event]
    assert fields(record) == FIELDS[following]
    assert following.broken or record["broken"] == ring_rules.OK


def test_the_table_is_whole() -> None:
    """Each state is in it and can be reached, and each event happens somewhere."""
    reached, left = {S.STOPPED}, {S.STOPPED}
    while left:
        left = {following for state in left for following in TRANSITIONS[state].values()} - reached
        reached |= left
    assert reached == set(TRANSITIONS) == set(FIELDS) == set(RingState)
    assert {event for events in TRANSITIONS.values() for event in events} == set(RingEvent)


@pytest.mark.parametrize("state", RingState, ids=lambda state: state.name)
def test_whatever_is_served_can_be_stopped(state: RingState) -> None:
    """In any state STOP leads to a state from which DRAINED, after what is to be resubmitted, makes it stopped."""
    if not state.served or state is S.ABANDONED:
        return
    following = TRANSITIONS[state][E.STOP]
    following = TRANSITIONS[following].get(E.RESUBMITTED, following)
    assert not TRANSITIONS[following][E.DRAINED].served


def test_a_ring_stays_broken_until_it_is_reset() -> None:
    """Only RESET leads from broken states to others, but for the end of the worker's thread."""
    ways = {
        event
        for state in RingState
        if state.broken
        for event, following in TRANSITIONS[state].items()
        if not following.broken
    }
    assert ways == {E.RESET, E.ABANDON}


def test_nothing_that_is_served_can_be_started_or_reset() -> None:
    for state in RingState:
        assert (E.START in TRANSITIONS[state]) == (state is S.STOPPED)
        assert E.RESET not in TRANSITIONS[state] or not state.served or state is S.ABANDONED


# What the loop does.


@pytest.mark.parametrize("state", RingState, ids=lambda state: state.name)
def test_a_broken_rule_is_noticed_once(state: RingState) -> None:
    """The loop breaks only rings from which it fetches."""
    states, record = machine_in(state)
    assert states.notice() is None
    if FIELDS[state][0]:
        record["running"], record["broken"] = 0, ring_rules.LOOP
        assert states.notice() is E.BREAK
        assert states.state is TRANSITIONS[state][E.BREAK]
        assert record["broken"] == ring_rules.LOOP
        assert states.notice() is None


def test_the_last_resubmitted_request_is_noticed_once() -> None:
    states, record = machine_in(S.RESUBMITTING)
    record["running"] = 0
    assert states.notice() is E.RESUBMITTED
    assert (states.state, fields(record)) == (S.DRAINING, FIELDS[S.DRAINING])
    assert states.notice() is None


# A queue of a worker, with requests in flight.


@pytest.fixture
def make_rig(tmp_path: Path) -> Iterator[RigFactory]:
    with rig_factory(tmp_path, pattern(4096)) as factory:
        yield factory


@pytest.mark.parametrize("broken", [False, True])
def test_a_ring_drains_while_requests_are_in_flight(make_rig: RigFactory, broken: bool) -> None:
    line = make_rig().line().start()
    with held(line.worker):
        line.put(IN, room=512)
        if broken:
            line.ring.put_bad_head()
        line.ring.publish()
        fetch_only(line.worker)
        drained = line.worker.stop_queue(line.queue)
        meanwhile = line.worker.call(lambda: line.queue.state)
    drained.result(PATIENCE)
    assert meanwhile.result(PATIENCE) is (S.DRAINING_BROKEN if broken else S.DRAINING)
    assert line.queue.state is (S.STOPPED_BROKEN if broken else S.STOPPED)


@pytest.mark.parametrize("expected", [S.RUNNING, S.BROKEN, S.SUSPENDED], ids=lambda state: state.name)
def test_a_stop_is_called_off_while_requests_are_in_flight(make_rig: RigFactory, expected: RingState) -> None:
    line = make_rig().line().start()
    memory = MemoryTable() if expected is S.SUSPENDED else line.rig.guest.table()
    with held(line.worker):
        pending = line.put(IN, room=512)
        if expected is S.BROKEN:
            line.ring.put_bad_head()
        line.ring.publish()
        fetch_only(line.worker)
        drained = line.worker.stop_queue(line.queue)
        continued = line.worker.call_off_stop(line.queue, memory, line.kick_fd)
        state = line.worker.call(lambda: (line.queue.state, line.queue.in_flight))
    assert continued.result(PATIENCE)
    assert state.result(PATIENCE) == (expected, 1)
    assert drained.cancelled()
    line.worker.set_memory(line.queue, line.rig.guest.table()).result(PATIENCE)
    assert eventually(lambda: line.queue.in_flight == 0)
    if expected is not S.BROKEN:
        line.wait()
        assert line.answer(pending).status == 0
        # With a kick.
        assert line.do(IN, room=512).status == 0
    line.stop()


def test_what_has_stopped_is_not_continued(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    line.stop()
    assert not line.worker.call_off_stop(line.queue, line.rig.guest.table(), line.kick_fd).result(PATIENCE)
    assert line.queue.state is S.STOPPED


def test_a_ring_cannot_be_started_twice_nor_before_its_reset(make_rig: RigFactory) -> None:
    line = make_rig().line().start()
    with pytest.raises(ImpossibleEvent, match="START of a ring that is running"):
        line.resume()
    line.ring.put_bad_head()
    line.kick()
    assert eventually(lambda: line.queue.state is S.BROKEN)
    line.stop()
    with pytest.raises(ImpossibleEvent, match="START of a ring that is broken and stopped"):
        line.resume()
    line.start()
    assert line.do(IN, room=512).status == 0


def test_rings_are_abandoned_when_their_thread_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the ring happens any more: no start, not even of another front end."""

    def fail() -> None:
        raise ZeroDivisionError

    with serve_in(tmp_path) as export, machine(export) as guest:
        guest.start()
        queue, worker = export.disk.queues[0], export.disk.workers[0]
        worker.call(lambda: monkeypatch.setattr(worker.rings, "follow_up", fail)).result(PATIENCE)
        assert eventually(lambda: queue.state is S.ABANDONED)
        guest.peer.close()
        assert eventually(lambda: export.state == "listening")
        with machine(export) as other, pytest.raises(Refused):
            other.start()
        assert "SET_VRING_CALL: ringplane-io-0 has ended" in caplog.text
        assert "a queue could not be stopped: ringplane-io-0 has ended" in caplog.text


# A session.


class SessionFollowsTheTable(RuleBasedStateMachine):
    """A front end sends messages about one ring in any order; the ring's state is what the table makes of them.

    The model has what the messages have set (is the ring described and enabled, is its memory there), knows which
    events a message means (the essay of ring_states.py), and applies them to the table.
    """

    export: ringplane.Export

    def __init__(self) -> None:
        super().__init__()
        self.guest: Machine = machine(self.export)
        self.queue = self.export.disk.queues[0]
        self.expected = S.STOPPED
        self.enabled = self.described = False
        self.shared = True

    def teardown(self) -> None:
        self.guest.__exit__()
        assert eventually(lambda: self.export.state == "listening")
        assert self.queue.state is S.STOPPED

    def happens(self, *events: RingEvent) -> None:
        for event in events:
            self.expected = TRANSITIONS[self.expected][event]

    def stops(self) -> None:
        if self.expected.served:
            self.happens(E.STOP, E.DRAINED)

    def ends(self) -> None:
        self.stops()
        self.happens(E.RESET)
        self.described = False

    def starts(self) -> contextlib.AbstractContextManager[object]:
        """Wants the ring to run, if it can; the result expects the front end to be refused if memory is missing."""
        if not (self.enabled and self.described):
            return contextlib.nullcontext()
        if self.expected is S.STOPPED_SUSPENDED and self.shared:
            self.happens(E.MEMORY_CHANGED)
        if self.expected is not S.STOPPED:
            return contextlib.nullcontext()
        if not self.shared:
            return pytest.raises(Refused)
        self.happens(E.START)
        return contextlib.nullcontext()

    @precondition(lambda self: not self.described and not self.expected.served)
    @rule()
    def describe(self) -> None:
        """A new ring, like that of a driver that starts."""
        guest, peer = self.guest, self.guest.peer
        guest.place_ring()
        peer.set_vring_num(0, guest.ring.size)
        peer.set_vring_base(0, 0)
        guest.set_addresses()
        peer.set_vring_call(0, guest.vring.call_fd)
        peer.set_vring_err(0, guest.vring.err_fd)
        self.described = True
        with self.starts():
            peer.set_vring_kick(0, guest.vring.kick_fd)

    @precondition(lambda self: self.described)
    @rule()
    def change_kick(self) -> None:
        self.stops()
        with self.starts():
            self.guest.peer.set_vring_kick(0, self.guest.vring.kick_fd)

    @rule()
    def enable(self) -> None:
        self.enabled = True
        with self.starts():
            self.guest.peer.set_vring_enable(0, True)

    @rule()
    def disable(self) -> None:
        self.enabled = False
        self.stops()
        self.guest.peer.set_vring_enable(0, False)

    @rule()
    def get_base(self) -> None:
        self.ends()
        self.guest.peer.get_vring_base(0)

    @rule()
    def reset_device(self) -> None:
        self.ends()
        self.enabled = False
        self.guest.peer.send(Request.RESET_DEVICE)

    @rule()
    def reset_status(self) -> None:
        self.ends()
        self.enabled = False
        self.guest.peer.set_status(0)

    @rule()
    def remove_memory(self) -> None:
        self.shared = False
        if self.expected.served:
            self.happens(E.MEMORY_REMOVED)
        self.guest.peer.set_mem_table([], [])

    @rule()
    def add_memory(self) -> None:
        self.shared = True
        if self.expected.served:
            self.happens(E.MEMORY_CHANGED)
        elif self.expected.suspended:
            with self.starts():
                pass
        self.guest.share_memory()

    @rule()
    def drain(self) -> None:
        if self.expected.served:
            self.stops()
            # A ring without memory starts when that is added.
            with self.starts():
                pass
        self.export.drain()

    @precondition(lambda self: self.expected is S.RUNNING)
    @rule()
    def read(self) -> None:
        assert self.guest.read(3) == sector(3)

    @precondition(lambda self: self.expected is S.RUNNING)
    @rule()
    def break_it(self) -> None:
        self.happens(E.BREAK)
        break_ring(self.guest)

    @invariant()
    def state_is_that_of_the_table(self) -> None:
        assert self.queue.state is self.expected
        assert fields(self.queue.record) == FIELDS[self.expected]
        assert bool(self.queue.record["broken"]) == self.expected.broken


def test_a_session_follows_the_table(tmp_path: Path) -> None:
    with serve_in(tmp_path) as export:
        run_state_machine_as_test(
            type("Bound", (SessionFollowsTheTable,), {"export": export}),
            settings=settings(
                max_examples=40,
                stateful_step_count=15,
            ),
        )
