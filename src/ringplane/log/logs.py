"""The log of a process: the format of its lines, and writing that never waits for a slow reader.

Lines go to standard error, in the journal's format if that is the journal (sd-daemon(3)).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ringplane.log.outlet import LIMIT, Outlet
from ringplane.log.repeats import Repeats

FORMATS = ("text", "json")

STDOUT, STDERR = 1, 2

# Seconds that the readers of standard output and standard error have at the end to take the remaining lines.
PATIENCE = 2.0

# Trace events that may wait besides log lines: as many as an I/O thread keeps.
TRACE_LIMIT = 1 << 17

# syslog(3)
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

# Control characters in a name must not look like another line.
CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]
else:
    Adapter = logging.LoggerAdapter


class DiskLog(Adapter):
    """A logger for lines about one disk; each line begins with its name."""

    def __init__(self, logger: logging.Logger, disk: str) -> None:
        super().__init__(logger, {"disk": disk})
        self._prefix = disk.replace("%", "%%") + ": "

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return self._prefix + msg, {**kwargs, "extra": self.extra}


class LineFormatter(logging.Formatter):
    """Plain text with a time stamp; for the journal, which has its own, with a priority instead."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = _message(record)
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        if self._journal:
            return "\n".join(f"{_priority(record)}{line}" for line in text.splitlines())
        return f"{_time(record.created)} ringplane: {record.levelname}: {text}"


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": _time(record.created), "level": record.levelname.lower(), "message": _message(record)}
        if hasattr(record, "disk"):
            fields["disk"] = record.disk
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return (_priority(record) if self._journal else "") + json.dumps(fields)


class Logs(logging.Handler):
    """All output of a process while it serves; a `with` writes the rest at its end.

    No thread is started before `start`. Python's own warnings and unhandled exceptions become log lines too.
    """

    def __init__(self, level: str = "INFO", style: str = "text") -> None:
        """`style` is one of FORMATS."""
        super().__init__()
        journal = is_journal(STDERR)
        self.setFormatter(JsonFormatter(journal=journal) if style == "json" else LineFormatter(journal=journal))
        self._style = style
        self._output = Outlet(STDOUT, "{} lines were lost".format)
        self._errors = Outlet(STDERR, self._lost, self._sum_up)
        self._limit = LIMIT
        self._repeats = Repeats(self._errors.wake)
        self.addFilter(self._repeats)
        # Only for our own loggers: Numba and asyncio have debug messages too.
        logging.getLogger("ringplane").setLevel(level.upper())

    def start(self) -> None:
        """Start the threads that write; called when the process has been confined."""
        self._output.start()
        self._errors.start()

    def say(self, text: str) -> None:
        """Print a line on standard output."""
        self._output.put(text)

    def trace(self, text: str) -> None:
        """Print a line about a request on standard error."""
        line = self.format(_record(logging.DEBUG, text)) if self._style == "json" else text
        # A log line must find room whatever is traced.
        self._limit = LIMIT + TRACE_LIMIT
        self._errors.put(line, TRACE_LIMIT)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            # This is a mistake in our own code; by default, logging would print a traceback.
            line = self.format(_record(logging.ERROR, f"line {record.lineno} of {record.pathname} cannot be formatted"))
        self._errors.put(line, self._limit)

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self)
        logging.captureWarnings(True)
        self._hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook = sys.unraisablehook = _log_exception
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        threading.excepthook, sys.unraisablehook = self._hooks
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self)
        self.close()

    def close(self) -> None:
        """Write the remaining lines, as long as they are read."""
        for record in self._repeats.sums(all_of_them=True):
            self.emit(record)
        deadline = time.monotonic() + PATIENCE
        self._output.stop(deadline)
        self._errors.stop(deadline)

    def _sum_up(self) -> float | None:
        for record in self._repeats.sums():
            self.emit(record)
        return self._repeats.next_due()

    def _lost(self, count: int) -> str:
        return self.format(_record(logging.WARNING, f"{count} lines were lost because nobody read the log in time"))


def is_journal(fd: int) -> bool:
    """Whether the fd is connected to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _log_exception(hooked: Any) -> None:
    """Log an exception that ends a thread or is raised in a finalizer."""
    log.error("internal error; please report it", exc_info=(hooked.exc_type, hooked.exc_value, hooked.exc_traceback))


def _record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord(log.name, level, __file__, 0, text, None, None)


def _message(record: logging.LogRecord) -> str:
    return record.getMessage().translate(CONTROL_CHARACTERS)


def _priority(record: logging.LogRecord) -> str:
    return f"<{PRIORITIES.get(record.levelno, 5)}>"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
