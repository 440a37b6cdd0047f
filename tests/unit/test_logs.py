"""The format of log lines, and the messages that go through the log."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from ringplane.log.logs import DiskLog, JsonFormatter, LineFormatter, is_journal

TIME = datetime(2026, 11, 26, 3, 40, 12, 345_000, UTC).timestamp()


def record(level: int, text: str, *arguments: object, error: BaseException | None = None, **extra: Any) -> Any:
    made = logging.LogRecord("ringplane.test", level, __file__, 1, text, arguments, None)
    made.created = TIME
    if error is not None:
        made.exc_info = (type(error), error, None)
    for name, value in extra.items():
        setattr(made, name, value)
    return made


def test_text_has_a_time_stamp() -> None:
    line = LineFormatter(journal=False).format(record(logging.WARNING, "front end %d", 1))
    assert line == "2026-11-26T03:40:12.345Z ringplane: WARNING: front end 1"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_the_journal_gets_a_priority_in_each_line(level: int, priority: int) -> None:
    """sd-daemon(3)"""
    text = LineFormatter(journal=True).format(record(level, "lost", error=ValueError("why")))
    assert text == f"<{priority}>lost\n<{priority}>ValueError: why"
    assert JsonFormatter(journal=True).format(record(level, "lost")).startswith(f'<{priority}>{{"time"')


def test_json_is_an_object_per_line() -> None:
    formatter = JsonFormatter(journal=False)
    line = formatter.format(record(logging.ERROR, "bad\n%s", '"', disk="a.img", error=ValueError("why")))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-11-26T03:40:12.345Z",
        "level": "error",
        "message": 'bad\\x0a"',
        "disk": "a.img",
        "traceback": "ValueError: why",
    }
    assert "disk" not in json.loads(formatter.format(record(logging.ERROR, "lost")))


def test_control_characters_are_escaped() -> None:
    line = LineFormatter(journal=True).format(record(logging.INFO, "attached: %s", "x\n<0>y\x1b[2J"))
    assert line == "<6>attached: x\\x0a<0>y\\x1b[2J"


def test_lines_about_a_disk_begin_with_it(caplog: pytest.LogCaptureFixture) -> None:
    DiskLog(logging.getLogger("ringplane.test"), "100%s.img").warning("%d requests", 3)
    (made,) = caplog.records
    assert made.getMessage() == "100%s.img: 3 requests"
    assert made.disk == "100%s.img"  # type: ignore[attr-defined]


def test_standard_error_is_the_journal_only_if_it_is_that_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd.exec(5): processes with another standard error inherit JOURNAL_STREAM, too."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert not is_journal(writing)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert is_journal(writing)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not is_journal(writing)
    for fd in (reading, writing):
        os.close(fd)


SPEAKERS = """
import logging, threading, warnings
from ringplane.log.logs import Logs

class Broken:
    def __del__(self):
        raise ValueError("in a finalizer")

def fail():
    raise ValueError("in a thread")

with Logs("INFO", {style!r}) as logs:
    logs.start()
    logging.getLogger("ringplane.x").debug("not asked for")
    logging.getLogger("ringplane.x").info("asked for")
    logging.getLogger("other").info("not ours")
    warnings.warn("a warning")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Broken()
    logging.getLogger("ringplane.x").info("%d", "no number")
    logs.trace("a trace event")
    logs.say("announced")
"""


@pytest.mark.parametrize("style", ["text", "json"])
def test_all_messages_of_python_go_through_the_log(style: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPEAKERS.format(style=style)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "announced\n"
    for text in ("asked for", "a warning", "in a thread", "in a finalizer", "cannot be formatted", "a trace event"):
        assert text in done.stderr, done.stderr
    assert "not asked for" not in done.stderr
    assert "not ours" not in done.stderr
    if style == "json":
        assert all(json.loads(line)["time"] for line in done.stderr.splitlines())
