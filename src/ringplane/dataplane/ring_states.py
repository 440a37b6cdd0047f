"""The states of a ring, and the table of all transitions between them.

The table is the state machine: whatever starts, stops, suspends or breaks a ring names an event, and the table says
which state follows. An event that the table does not have in a state is a mistake of ours, and raises. Everything that
depends on a ring's state asks here; there are no flags beside it.

What a state means
==================

A ring is *served* from its start until it is drained. While it is served, the worker keeps its memory table, its file
and, in most states, watches its kicks.

- STOPPED: nothing of it is used. A new queue, and one that is drained. The front end may change everything.
- RUNNING: the loop fetches its requests.
- SUSPENDED: the front end has removed the memory that the ring lies in. Nothing is fetched. The requests in flight end
  in the old memory, which is kept; the error eventfd has been signalled. It runs again when the memory is added again.
- BROKEN: the driver broke a rule (ring_rules.py), which the log names; the error eventfd has been signalled. Nothing is
  fetched, requests in flight end. The front end still has to stop it.
- RESUBMITTING: it was to stop, but requests of the previous process wait to be resubmitted (inflight/recover.py). Only
  these are fetched, since the front end believes them to be in flight.
- DRAINING: nothing is fetched; it is stopped when the last request in flight has ended.
- DRAINING_BROKEN: the same, of a broken ring.
- STOPPED_BROKEN: drained, but the driver has not reset it: it cannot start, whatever else the front end sends.
- DRAINING_SUSPENDED: draining, of a suspended ring.
- STOPPED_SUSPENDED: drained, but the ring is still outside the memory. When that is added it starts, if the front end
  wants it to run; until then no message is refused because the memory is missing.
- ABANDONED: the worker's thread has failed, so nothing happens to the ring any more: it cannot be stopped. When its
  front end has gone it is as good as stopped, but it cannot be started, because the worker has ended.

Who changes it
==============

The worker's thread changes the state of a ring that is served, between two runs of the loop (served_rings.py). The
control plane changes that of a stopped one, of which the worker knows nothing: RESET, TAKE_OVER_BROKEN, and
MEMORY_CHANGED of a suspended one just before its START. START is asked for by the control plane, and happens on the
worker's thread. Other threads may read the state at any time.

Compiled code does not know these states. It has three fields of the QUEUE struct: `running` and `draining`, which
follow from the state (FIELDS), and `broken`, the number of the rule. It writes two of them: `running` becomes 0 when a
ring breaks or has been resubmitted, and `broken` the rule. `notice` turns that into an event after the run.

Which messages lead to which events
===================================

- START: the last of SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_KICK (in band: VRING_KICK) and SET_VRING_ENABLE 1 (without
  protocol features: SET_FEATURES). Also whatever stops rings for a moment: see STOP.
- STOP, and STOP_AFTER_RESUBMITTING if the previous process has left requests: SET_VRING_ENABLE 0, GET_VRING_BASE,
  SET_VRING_KICK, SET_STATUS 0, RESET_OWNER, RESET_DEVICE, and the end of the connection. For a moment: SET_FEATURES and
  SET_LOG_BASE if they change how the ring is used, SET_CONFIG, `Export.drain`, a hand-over to another process. A ring
  that is already stopped, or about to be, can be stopped again: whoever cleans up need not ask first.
- CONTINUE: no message; a hand-over is refused because requests in flight take too long, so its stop is called off.
- RESET, once it is stopped: GET_VRING_BASE, SET_STATUS 0, RESET_DEVICE, and the end of the connection (that one also
  if it is abandoned).
- MEMORY_REMOVED, MEMORY_CHANGED: SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG, if the ring is outside or inside the new
  memory table. For STOPPED_SUSPENDED, MEMORY_CHANGED and then START are what each of these messages and those of START
  lead to, if the ring is to run and is inside the memory.
- TAKE_OVER_BROKEN: no message; a process takes over a front end whose ring was broken.
- BREAK, RESUBMITTED, DRAINED: no message; the loop has found a rule broken, has resubmitted the last request, has
  completed the last request in flight.
- ABANDON: no message; the worker's thread has failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

import numpy as np

from ringplane.dataplane import ring_rules


class RingState(Enum):
    """What a ring does; the values are words for messages."""

    STOPPED = "stopped"
    RUNNING = "running"
    SUSPENDED = "suspended"
    BROKEN = "broken"
    RESUBMITTING = "resubmitting"
    DRAINING = "draining"
    DRAINING_BROKEN = "broken and draining"
    STOPPED_BROKEN = "broken and stopped"
    DRAINING_SUSPENDED = "suspended and draining"
    STOPPED_SUSPENDED = "suspended and stopped"
    ABANDONED = "abandoned"

    @property
    def served(self) -> bool:
        """Whether the worker still has it."""
        return self not in (RingState.STOPPED, RingState.STOPPED_BROKEN, RingState.STOPPED_SUSPENDED)

    @property
    def broken(self) -> bool:
        """Whether the driver broke a rule and has not reset the ring since."""
        return self in (RingState.BROKEN, RingState.DRAINING_BROKEN, RingState.STOPPED_BROKEN)

    @property
    def suspended(self) -> bool:
        """Whether its memory was removed and has not been added since."""
        return self in (RingState.SUSPENDED, RingState.DRAINING_SUSPENDED, RingState.STOPPED_SUSPENDED)


class RingEvent(Enum):
    """What happens to a ring."""

    START = auto()
    STOP = auto()
    STOP_AFTER_RESUBMITTING = auto()
    CONTINUE = auto()
    RESUBMITTED = auto()
    DRAINED = auto()
    BREAK = auto()
    RESET = auto()
    MEMORY_REMOVED = auto()
    MEMORY_CHANGED = auto()
    TAKE_OVER_BROKEN = auto()
    ABANDON = auto()


S, E = RingState, RingEvent

TRANSITIONS: Mapping[RingState, Mapping[RingEvent, RingState]] = {
    S.STOPPED: {
        E.START: S.RUNNING,
        E.STOP: S.STOPPED,
        E.RESET: S.STOPPED,
        E.TAKE_OVER_BROKEN: S.STOPPED_BROKEN,
    },
    S.RUNNING: {
        E.STOP: S.DRAINING,
        E.STOP_AFTER_RESUBMITTING: S.RESUBMITTING,
        E.BREAK: S.BROKEN,
        E.MEMORY_REMOVED: S.SUSPENDED,
        E.MEMORY_CHANGED: S.RUNNING,
        E.ABANDON: S.ABANDONED,
    },
    S.SUSPENDED: {
        E.STOP: S.DRAINING_SUSPENDED,
        E.MEMORY_REMOVED: S.SUSPENDED,
        E.MEMORY_CHANGED: S.RUNNING,
        E.ABANDON: S.ABANDONED,
    },
    S.BROKEN: {
        E.STOP: S.DRAINING_BROKEN,
        E.MEMORY_REMOVED: S.BROKEN,
        E.MEMORY_CHANGED: S.BROKEN,
        E.ABANDON: S.ABANDONED,
    },
    S.RESUBMITTING: {
        E.STOP: S.RESUBMITTING,
        E.STOP_AFTER_RESUBMITTING: S.RESUBMITTING,
        E.CONTINUE: S.RUNNING,
        E.RESUBMITTED: S.DRAINING,
        E.BREAK: S.DRAINING_BROKEN,
        # What is not resubmitted yet cannot be read any more.
        E.MEMORY_REMOVED: S.DRAINING,
        E.MEMORY_CHANGED: S.RESUBMITTING,
        E.ABANDON: S.ABANDONED,
    },
    S.DRAINING: {
        E.STOP: S.DRAINING,
        E.CONTINUE: S.RUNNING,
        E.DRAINED: S.STOPPED,
        E.MEMORY_REMOVED: S.DRAINING,
        E.MEMORY_CHANGED: S.DRAINING,
        E.ABANDON: S.ABANDONED,
    },
    S.DRAINING_BROKEN: {
        E.STOP: S.DRAINING_BROKEN,
        E.CONTINUE: S.BROKEN,
        E.DRAINED: S.STOPPED_BROKEN,
        E.MEMORY_REMOVED: S.DRAINING_BROKEN,
        E.MEMORY_CHANGED: S.DRAINING_BROKEN,
        E.ABANDON: S.ABANDONED,
    },
    S.STOPPED_BROKEN: {
        E.STOP: S.STOPPED_BROKEN,
        E.RESET: S.STOPPED,
    },
    S.DRAINING_SUSPENDED: {
        E.STOP: S.DRAINING_SUSPENDED,
        E.CONTINUE: S.SUSPENDED,
        E.DRAINED: S.STOPPED_SUSPENDED,
        E.MEMORY_REMOVED: S.DRAINING_SUSPENDED,
        E.MEMORY_CHANGED: S.DRAINING,
        E.ABANDON: S.ABANDONED,
    },
    S.STOPPED_SUSPENDED: {
        E.STOP: S.STOPPED_SUSPENDED,
        E.RESET: S.STOPPED,
        E.MEMORY_CHANGED: S.STOPPED,
    },
    # Calls of the worker raise WorkerEnded, so no other event comes here.
    S.ABANDONED: {
        E.RESET: S.STOPPED,
    },
}

# The fields (running, draining) of the QUEUE struct in each state.
FIELDS: Mapping[RingState, tuple[int, int]] = {
    S.STOPPED: (0, 0),
    S.RUNNING: (1, 0),
    S.SUSPENDED: (0, 0),
    S.BROKEN: (0, 0),
    S.RESUBMITTING: (1, 1),
    S.DRAINING: (0, 1),
    S.DRAINING_BROKEN: (0, 1),
    S.STOPPED_BROKEN: (0, 0),
    S.DRAINING_SUSPENDED: (0, 1),
    S.STOPPED_SUSPENDED: (0, 0),
    S.ABANDONED: (0, 0),
}


class ImpossibleEvent(RuntimeError):
    """The table has no such event in the state of the ring."""


class RingStateMachine:
    """The state of one ring, and the fields of its QUEUE struct that follow from it."""

    def __init__(self, record: np.void) -> None:
        self._record = record
        self.state = RingState.STOPPED

    def check(self, event: RingEvent) -> RingState:
        """The state that would follow; raises ImpossibleEvent."""
        try:
            return TRANSITIONS[self.state][event]
        except KeyError:
            raise ImpossibleEvent(f"{event.name} of a ring that is {self.state.value}") from None

    def apply(self, event: RingEvent) -> RingState:
        """Change the state; raises ImpossibleEvent, and changes nothing then. Returns the new state."""
        self.state = self.check(event)
        self._record["running"], self._record["draining"] = FIELDS[self.state]
        if not self.state.broken:
            self._record["broken"] = ring_rules.OK
        return self.state

    def notice(self) -> RingEvent | None:
        """Apply and return what the last run of the loop has done to the ring, if anything."""
        if not FIELDS[self.state][0] or self._record["running"]:
            return None
        event = RingEvent.BREAK if self._record["broken"] else RingEvent.RESUBMITTED
        self.apply(event)
        return event
