"""`ringplane top` on a terminal: one loop that waits for keys, for answers of the API, and for the next interval."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ringplane.api.schemas import Statistics
from ringplane.cli.top.disk_columns import ORDERS
from ringplane.cli.top.figures import ASCII_BARS, BARS
from ringplane.cli.top.keyboard import keys_of, pressed
from ringplane.cli.top.known import Known, View
from ringplane.cli.top.lines import Line
from ringplane.cli.top.sampler import Sampler
from ringplane.cli.top.table_layout import last_first, screen
from ringplane.client.api_errors import ApiError, NoConnection
from ringplane.client.client import Client, Request
from ringplane.system.signals import Signals

# Seconds without an answer after which the screen says so, and after which it asks again.
SOON, LATE = 2.0, 10.0

LOST = "not connected, trying again"

TARGET = "/v1/statistics"

BY_KEY = {name[0]: name for name in ORDERS}


class LiveScreen:
    """Shows the table until `q` or Ctrl-C."""

    def __init__(self, client: Client, interval: float, view: View, signals: Signals, console: Console) -> None:
        self._client, self._interval, self._signals, self._console = client, interval, signals, console
        self._sampler, self._view = Sampler(), view
        self._trouble = ""
        self._request: Request | None = None
        self._asked = self._next = time.monotonic()
        self._quit = False
        self._selector = selectors.EpollSelector()

    def run(self) -> None:
        """Raises Interrupted, and ApiError if the first answer does not come."""
        self._sampler.add(self._client.read(TARGET, Statistics))
        self._next += self._interval
        keyboard = sys.stdin.fileno()
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            self._selector.register(keyboard, selectors.EVENT_READ, self._read_keys)
            self._selector.register(stack.enter_context(_resized()), selectors.EVENT_READ, self._resize)
            stack.enter_context(keys_of(keyboard))
            live = stack.enter_context(Live(console=self._console, screen=True, auto_refresh=False))
            while not self._quit:
                self._ask_if_due()
                live.update(self._picture(), refresh=True)
                self._wait()

    def _end(self) -> None:
        if self._request is not None:
            self._request.close()
        self._selector.close()

    def _wait(self) -> None:
        """Until something has happened, or something is due."""
        due = self._next if self._request is None else self._asked + (LATE if self._trouble else SOON)
        self._signals.wait(self._selector.fileno(), max(due - time.monotonic(), 0.0))
        for key, _ in self._selector.select(0):
            key.data(key.fd)
        if self._request is not None and (waited := time.monotonic() - self._asked) >= SOON:
            self._trouble = "no answer, waiting"
            if waited >= LATE:
                self._end_request().close()
                self._lose(LOST)

    def _ask_if_due(self) -> None:
        if self._request is not None or time.monotonic() < self._next:
            return
        self._asked = time.monotonic()
        # After a pause, as when the process was stopped, the missed intervals are not made up for.
        self._next = max(self._next, self._asked - self._interval) + self._interval
        try:
            self._request = self._client.send("GET", TARGET)
            self._selector.register(self._request, selectors.EVENT_READ, self._read_answer)
        except ApiError as error:
            self._lose(trouble(error))

    def _read_answer(self, _: int) -> None:
        try:
            self._sampler.add(self._client.decode(self._end_request().body(), Statistics))
            self._trouble = ""
        except ApiError as error:
            self._lose(trouble(error))

    def _end_request(self) -> Request:
        """The request, for which nobody waits any more."""
        request, self._request = self._request, None
        assert request is not None
        self._selector.unregister(request)
        return request

    def _lose(self, why: str) -> None:
        self._sampler.interrupt()
        self._trouble = why

    def _read_keys(self, fd: int) -> None:
        data = os.read(fd, 1024)
        if not data:
            # The terminal has gone.
            self._quit = True
        for key in pressed(data):
            self._press(key)

    def _press(self, key: str) -> None:
        view, (width, height) = self._view, self._console.size
        last = last_first(self._known(), view, width, height)
        steps = {"up": -1, "down": 1, "page up": -height // 2, "page down": height // 2, "home": -last, "end": last}
        if key == "q":
            self._quit = True
        elif key in BY_KEY:
            name = BY_KEY[key]
            self._view = replace(view, sort=name, reverse=name == view.sort and not view.reverse, first=0)
        elif key == "p":
            self._view = replace(view, policies=not view.policies, first=0)
        elif key in steps:
            self._view = replace(view, first=min(max(view.first + steps[key], 0), last))

    def _resize(self, fd: int) -> None:
        os.eventfd_read(fd)

    def _known(self) -> Known:
        return known(self._client, self._sampler, self._console, self._trouble)

    def _picture(self) -> Group:
        width, height = self._console.size
        return Group(*map(_styled, screen(self._known(), self._view, width, height)))


def trouble(error: ApiError) -> str:
    """Why there is no answer for now."""
    return LOST if isinstance(error, NoConnection) else str(error)


def known(client: Client, sampler: Sampler, console: Console, trouble: str = "") -> Known:
    """What there is to show."""
    bars = BARS if console.encoding.startswith("utf") else ASCII_BARS
    return Known(str(client.path), sampler.rates, sampler.samples, sampler.end, trouble, bars)


def _styled(line: Line) -> Text:
    return Text.assemble(*line, no_wrap=True, overflow="crop")


@contextlib.contextmanager
def _resized() -> Iterator[int]:
    """An eventfd that is readable when the terminal has another size."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    before = signal.signal(signal.SIGWINCH, lambda *_: os.eventfd_write(fd, 1))
    try:
        yield fd
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(fd)
