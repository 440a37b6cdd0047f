"""Log lines that come again and again: the first few come out, then they are counted and summed up.

A front end or a driver can provoke most log lines as often as it likes, and must not fill the disk with them. What is
counted is a kind of line: the place in the code that it comes from, and the disk that it is about. So a front end that
connects again changes nothing.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

# Of each kind so many lines come out at once, then one more and a sum per PERIOD, in seconds.
BURST = 10
PERIOD = 10.0

Kind = tuple[object, str, int]


@dataclass(slots=True)
class _Seen:
    """Of one kind. `credit` is how many lines may come out, as of `at`; `last` is the newest of the `more` others."""

    credit: float
    at: float
    more: int = 0
    due: float = 0.0
    last: logging.LogRecord | None = field(default=None, repr=False)


class Repeats(logging.Filter):
    """Filters out repeated records; whoever uses it asks for the sums. Any thread may call.

    `counting` is called when there will be a sum for which `next_due` has not accounted yet.
    """

    def __init__(self, counting: Callable[[], object] = lambda: None, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._counting, self._clock = counting, clock
        self._lock = threading.RLock()
        self._seen: dict[Kind, _Seen] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is to come out now. What is for debugging always is."""
        if record.levelno <= logging.DEBUG:
            return True
        with self._lock:
            now = self._clock()
            seen = self._seen.setdefault(_kind(record), _Seen(BURST, now))
            seen.credit, seen.at = min(BURST, seen.credit + (now - seen.at) / PERIOD), now
            if seen.more == 0 and seen.credit >= 1:
                seen.credit -= 1
                return True
            first = seen.more == 0
            seen.more, seen.last = seen.more + 1, _as_text(record)
            seen.due = now + PERIOD if first else seen.due
        if first:
            self._counting()
        return False

    def sums(self, *, all_of_them: bool = False) -> list[logging.LogRecord]:
        """Those that are due, as records, in the order of the last that each is about."""
        with self._lock:
            now = self._clock()
            due = [_sum(seen) for seen in self._seen.values() if seen.more and (all_of_them or seen.due <= now)]
        return sorted(due, key=lambda record: record.created)

    def next_due(self) -> float | None:
        """In how many seconds there is a sum; None for never, as things stand."""
        with self._lock:
            due = min((seen.due for seen in self._seen.values() if seen.more), default=None)
            return None if due is None else max(0.0, due - self._clock())


def _kind(record: logging.LogRecord) -> Kind:
    return getattr(record, "disk", None), record.name, record.lineno


def _as_text(record: logging.LogRecord) -> logging.LogRecord:
    """The same without its arguments: an exception among them holds frames, and through them a front end's memory."""
    plain = copy.copy(record)
    try:
        plain.msg = record.getMessage()
    except Exception:
        plain.msg = str(record.msg)
    plain.args = plain.exc_info = plain.exc_text = None
    return plain


def _sum(seen: _Seen) -> logging.LogRecord:
    record, count = seen.last, seen.more
    assert record is not None
    record.msg += f" (the last of {count} more like this)"
    seen.more, seen.last = 0, None
    return record
