"""What happens to disks, for programs that follow it: the counterpart of log lines, which are for people.

Whatever reports an event has an `Emit`. `Events` keeps the newest events, and each subscriber reads at its own pace: if
it falls behind it loses the oldest ones, and learns how many.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

# Events that are kept for subscribers that come or read later.
KEPT = 256


class Emit(Protocol):
    """Reports an event of one disk; any thread may call, and none is held up."""

    def __call__(self, kind: str, **fields: object) -> None: ...


def no_events(kind: str, **fields: object) -> None:
    """Where nobody follows them."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened; `number` counts the events of this process, `time` is in seconds since 1970."""

    number: int
    time: float
    kind: str
    disk: str
    fields: dict[str, object] = field(default_factory=dict)


class Events:
    """The newest events of a process. Any thread may call."""

    def __init__(self) -> None:
        # Numbers mean something only together with it, because each process begins at 1.
        self.process = f"{time.time_ns():x}"
        self._numbers = itertools.count(1)
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._wakes: set[Callable[[], None]] = set()

    def snapshot(self) -> dict[str, Any]:
        """What another process needs to continue."""
        with self._lock:
            return {"process": self.process, "kept": [list(astuple(event)) for event in self._kept]}

    def resume_from(self, saved: Mapping[str, Any]) -> None:
        """Continue for another process: its subscribers miss nothing when they come here. Raises TypeError."""
        self.process = str(saved["process"])
        self._kept.extend(Event(*event) for event in saved["kept"])
        self._numbers = itertools.count(self.last + 1)

    @property
    def last(self) -> int:
        """The number of the newest event; 0: none yet."""
        with self._lock:
            return self._kept[-1].number if self._kept else 0

    @property
    def subscribers(self) -> int:
        """How many there are."""
        return len(self._wakes)

    def emit(self, kind: str, disk: str = "", **fields: object) -> None:
        """Add an event."""
        with self._lock:
            self._kept.append(Event(next(self._numbers), time.time(), kind, disk, fields))
            wakes = list(self._wakes)
        for wake in wakes:
            wake()

    def of(self, disk: str) -> Emit:
        """For events of this disk."""

        def emit(kind: str, **fields: object) -> None:
            self.emit(kind, disk, **fields)

        return emit

    def after(self, number: int) -> tuple[list[Event], int]:
        """The events that came after the one with this number, and how many of them are no longer kept."""
        with self._lock:
            events = [event for event in self._kept if event.number > number]
        return events, events[0].number - number - 1 if events else 0

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on any thread, after each event; it must not block."""
        with self._lock:
            self._wakes.add(wake)

    def unsubscribe(self, wake: Callable[[], None]) -> None:
        """End `subscribe`."""
        with self._lock:
            self._wakes.discard(wake)
