"""Reconnecting: a thread of the control plane makes another connection for each one that was lost.

It starts when the disk is served: then the process is confined, and the thread with it. For `delay` seconds requests
wait, and are sent again on the new connection. Then they fail, and so do new ones, until there is a connection again.
An I/O thread notices the end of its connection; without a front end, this thread does.

A server may accept connections and close each one at a certain request. So a connection does not end an outage: that of
a link continues if a request had waited for this connection too, and it is over `delay` seconds after it began. And
however connections end, there is a pause between attempts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ringplane.block.sources.nbd.connecting import PATIENCE
from ringplane.block.sources.nbd.handshake import HandshakeError
from ringplane.block.sources.nbd.silence import LOOK
from ringplane.block.sources.nbd.slowness import Slowness
from ringplane.block.sources.service import ServiceState
from ringplane.opener.opener import OpenerEnded
from ringplane.system.notes import in_words
from ringplane.system.ready_thread import ReadyThread
from ringplane.system.signals import Signals

if TYPE_CHECKING:
    import socket

    from ringplane.block.sources.nbd.handshake import Export
    from ringplane.block.sources.nbd.link import Link

log = logging.getLogger(__name__)

# Seconds between two attempts, at first and at most; after longer ones they begin with the first again. And the least
# time for one.
FIRST_PAUSE, LONGEST_PAUSE, LEAST_PATIENCE = 0.05, 1.0, 0.2


class Connect(Protocol):
    """Makes a connection, or raises HandshakeError, OpenerEnded."""

    def __call__(self, signals: Signals, patience: float, /) -> tuple[socket.socket, Export]: ...


@dataclass
class _Outage:
    """Of a link, which may have a connection that has not proved itself; times by time.monotonic()."""

    link: Link
    since: float
    # Requests wait until then; None: they do not wait.
    until: float | None
    # They do not wait any more.
    late: bool = False
    connected: bool = False


class _Ending(Signals):
    """Ends an attempt to connect when the disk is closed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def check(self) -> None:
        if _wait(self.fd, seconds=0):
            raise HandshakeError("is not needed any more")

    def wait(self, fd: int, timeout: float | None = None) -> bool:
        ready = _wait(fd, self.fd, seconds=timeout)
        self.check()
        return ready


class Reconnecting:
    """For all links of a disk."""

    def __init__(self, title: str, connect: Connect, delay: int) -> None:
        """`delay`: seconds for which requests wait."""
        self.delay = delay
        self._title, self._connect = title, connect
        # I/O threads write to it when they have lost a connection.
        self.lost_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ending = _Ending()
        self._links: list[Link] = []
        self._slowness = Slowness(title, self._links)
        self._outages: dict[Link, _Outage] = {}
        # The next attempt, by time.monotonic(), the pause after it, and why the last one failed.
        self._attempt_at, self._pause, self._error = 0.0, FIRST_PAUSE, ""
        # Connections that were made in place of lost ones.
        self.reconnects = 0
        self._closed = False
        self._thread = ReadyThread("nbd-reconnect")

    @property
    def state(self) -> ServiceState:
        """Any thread may ask."""
        if not (lost := self._lost):
            return "ok"
        return "failing" if any(outage.late or outage.until is None for outage in lost) else "reconnecting"

    def add(self, link: Link) -> None:
        """Look after this link too; before any I/O thread uses it."""
        self._links.append(link)

    def start(self) -> None:
        """Start the thread, which waits for `begin`. Raises NoThread."""
        self._thread.start()

    def begin(self) -> None:
        """The disk is served."""
        self._thread.begin(self._run)

    def end(self) -> None:
        """End the thread. No I/O thread uses a link."""
        self._closed = True
        os.eventfd_write(self._ending.fd, 1)
        self._thread.dismiss()
        self._thread.join()

    def close(self) -> None:
        """After `end`, and when the links are closed."""
        os.close(self.lost_fd)
        os.close(self._ending.fd)

    def _run(self) -> None:
        while not self._closed:
            self._look_for_losses()
            self._fail_late_ones()
            if self._lost and time.monotonic() >= self._attempt_at:
                self._try_once()

    @property
    def _lost(self) -> list[_Outage]:
        return [outage for outage in tuple(self._outages.values()) if not outage.connected]

    @property
    def _ends(self) -> list[float]:
        """When requests stop waiting, those that still do."""
        return [outage.until for outage in self._lost if outage.until is not None and not outage.late]

    def _look_for_losses(self) -> None:
        """Wait until a connection is lost, or there is something to do without that."""
        unattended = [sock.fileno() for link in self._links if (sock := link.unattended)]
        if _wait(self.lost_fd, self._ending.fd, *unattended, seconds=self._left()):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.lost_fd)
        for link in self._links:
            link.end_if_silent()
            link.look_after()
            if why := link.take_loss():
                self._note(link, why)
        self._slowness.look()

    def _left(self) -> float | None:
        """Seconds until there is something to do; None: there is nothing."""
        now = time.monotonic()
        left = [end - now for end in self._ends]
        if self._lost:
            left.append(self._attempt_at - now)
        if any(link.connection for link in self._links):
            left.append(LOOK)
        return max(min(left), 0) if left else None

    def _note(self, link: Link, why: str) -> None:
        then = f"requests wait for up to {self.delay} s" if self.delay else "requests fail until then"
        log.warning("%s: %s; connecting again, %s", self._title, why, then)
        link.drop()
        now, outage = time.monotonic(), self._outages.get(link)
        if outage is None or not link.lost_again:
            self._outages[link] = _Outage(link, now, now + self.delay if self.delay else None)
        else:
            outage.late = outage.connected = False

    def _fail_late_ones(self) -> None:
        for outage in self._lost:
            if outage.until is not None and not outage.late and time.monotonic() >= outage.until:
                outage.late = True
                log.error(
                    "%s: requests have waited for %d s; they fail until there is a connection", self._title, self.delay
                )
                outage.link.stop_waiting()

    def _try_once(self) -> None:
        """Connect again for each link without a connection; if that fails, not for the others either."""
        if time.monotonic() > self._attempt_at + LONGEST_PAUSE:
            self._pause = FIRST_PAUSE
        error = ""
        for outage in self._lost:
            try:
                self._connect_again(outage)
            except HandshakeError as why:
                error = f"the server {why}"
                break
            except OpenerEnded as why:
                error = f"the server cannot be reached: {why}"
                break
            except OSError as why:
                error = f"its connection cannot be used: {in_words(why)}"
                break
        if error and error != self._error and not self._closed:
            log.warning("%s: cannot connect again: %s", self._title, error)
        self._error = error
        self._attempt_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _connect_again(self, outage: _Outage) -> None:
        """Raises HandshakeError, OpenerEnded, OSError."""
        patience = min([PATIENCE, *(end - time.monotonic() for end in self._ends)])
        sock, export = self._connect(self._ending, max(patience, LEAST_PATIENCE))
        outage.link.continue_with(sock, structured=export.structured)
        # Counted before the state says so.
        self.reconnects += 1
        outage.connected = True
        log.info("%s: connected again after %.1f s", self._title, time.monotonic() - outage.since)


def _wait(*fds: int, seconds: float | None) -> bool:
    """Whether one of the fds is readable within this time; None: wait without limit."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
