"""Repeated log lines: the first few are written, then they are counted and summed up.

A front end or a driver can provoke most log lines as often as it likes, and must not fill the disk with them. Lines
are counted by kind: the place in the code that they come from, and the disk that they are about. So the count of a
front end that connects again continues.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

# BURST lines of each kind are written at once, then one more and a sum per PERIOD, in seconds.
BURST = 10
PERIOD = 10.0

Kind = tuple[object, str, int]


@dataclass(slots=True)
class _Seen:
    """One kind of line. `credit` lines may be written, as of `at`; `last` is the newest of the `more` others."""

    credit: float
    at: float
    more: int = 0
    due: float = 0.0
    last: logging.LogRecord | None = field(default=None, repr=False)


class Repeats(logging.Filter):
    """Filters out repeated records; the user of the filter asks for the sums. Any thread may call.

    `counting` is called when there will be a sum that the last result of `next_due` does not include.
    """

    def __init__(self, counting: Callable[[], object] = lambda: None, clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._counting, self._clock = counting, clock
        self._lock = threading.RLock()
        self._seen: dict[Kind, _Seen] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the record now; always true for debug records."""
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
        """The sums that are due, as records, ordered by the last record of each."""
        with self._lock:
            now = self._clock()
            due = [_sum(seen) for seen in self._seen.values() if seen.more and (all_of_them or seen.due <= now)]
        return sorted(due, key=lambda record: record.created)

    def next_due(self) -> float | None:
        """The seconds until the next sum is due; None if there is none."""
        with self._lock:
            due = min((seen.due for seen in self._seen.values() if seen.more), default=None)
            return None if due is None else max(0.0, due - self._clock())


def _kind(record: logging.LogRecord) -> Kind:
    return getattr(record, "disk", None), record.name, record.lineno


def _as_text(record: logging.LogRecord) -> logging.LogRecord:
    """The record without its arguments: an exception among them refers to frames, and so to a front end's memory."""
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
