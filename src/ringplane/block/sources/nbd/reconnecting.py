"""Reconnecting: a thread of the control plane makes another connection for each one that was lost.

It starts when the disk is served: then the process is confined, and the thread with it. For `delay` seconds requests
wait, and are sent again on the new connection. Then they fail, and so do new ones, until there is a connection again.
An I/O thread notices the end of its connection; without a front end, this thread does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ringplane.block.sources.nbd.connecting import PATIENCE
from ringplane.block.sources.nbd.handshake import HandshakeError
from ringplane.system.signals import Signals

if TYPE_CHECKING:
    import socket

    from ringplane.block.sources.nbd.handshake import Export
    from ringplane.block.sources.nbd.link import Link

log = logging.getLogger(__name__)

# Seconds between two attempts, at first and at most; and the least time for one.
FIRST_PAUSE, LONGEST_PAUSE, LEAST_PATIENCE = 0.05, 1.0, 0.2


class Connect(Protocol):
    """Makes a connection, or raises HandshakeError."""

    def __call__(self, signals: Signals, patience: float, /) -> tuple[socket.socket, Export]: ...


@dataclass
class _Loss:
    """Of the connection of a link; times by time.monotonic()."""

    link: Link
    since: float
    # Requests wait until then; None: they do not wait any more.
    until: float | None


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
        self._losses: list[_Loss] = []
        self._closed = False
        self._looks_after, self._looking = True, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="nbd-reconnect", daemon=True)

    def add(self, link: Link) -> None:
        """Look after this link too; before any I/O thread uses it."""
        self._links.append(link)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def leave_alone(self) -> None:
        """From now on another process may use the connections that no I/O thread uses: what arrives is not ours."""
        with self._looking:
            self._looks_after = False

    def close(self) -> None:
        """End the thread. No I/O thread uses a link."""
        self._closed = True
        os.eventfd_write(self._ending.fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self.lost_fd)
        os.close(self._ending.fd)

    def _run(self) -> None:
        pause, last = FIRST_PAUSE, ""
        while not self._closed:
            self._look_for_losses(seconds=pause if self._losses else None)
            error = self._try_once()
            if not error:
                pause, last = FIRST_PAUSE, ""
            else:
                pause = min(2 * pause, LONGEST_PAUSE)
                if error != last and not self._closed:
                    log.warning("%s: cannot connect again: the server %s", self._title, error)
                    last = error
            self._fail_late_ones()

    def _look_for_losses(self, seconds: float | None) -> None:
        """Wait for this time, or until a connection is lost; None: until one is lost."""
        looked_after = self._links if self._looks_after else ()
        unattended = [sock.fileno() for link in looked_after if (sock := link.unattended)]
        if _wait(self.lost_fd, self._ending.fd, *unattended, seconds=self._until_late(seconds)):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.lost_fd)
        with self._looking:
            for link in self._links if self._looks_after else ():
                link.look_after()
        for link in self._links:
            if why := link.take_loss():
                self._note(link, why)

    def _note(self, link: Link, why: str) -> None:
        then = f"requests wait for up to {self.delay} s" if self.delay else "requests fail until then"
        log.warning("%s: %s; connecting again, %s", self._title, why, then)
        link.drop()
        now = time.monotonic()
        self._losses.append(_Loss(link, now, now + self.delay if self.delay else None))

    def _until_late(self, seconds: float | None) -> float | None:
        """The shorter one of this time and that until requests stop waiting."""
        ends = [loss.until for loss in self._losses if loss.until is not None]
        return min(max(min(ends) - time.monotonic(), 0), seconds or PATIENCE) if ends else seconds

    def _try_once(self) -> str:
        """Connect again for each loss; returns what went wrong, or an empty text."""
        while self._losses and not self._closed:
            patience = max(self._until_late(PATIENCE) or 0, LEAST_PATIENCE)
            try:
                sock, export = self._connect(self._ending, patience)
            except HandshakeError as error:
                return str(error)
            loss = self._losses.pop(0)
            loss.link.continue_with(sock, structured=export.structured)
            log.info("%s: connected again after %.1f s", self._title, time.monotonic() - loss.since)
        return ""

    def _fail_late_ones(self) -> None:
        for loss in self._losses:
            if loss.until is not None and time.monotonic() >= loss.until:
                loss.until = None
                log.error("%s: no connection for %d s; requests fail until there is one", self._title, self.delay)
                loss.link.stop_waiting()


def _wait(*fds: int, seconds: float | None) -> bool:
    """Whether one of the fds is readable within this time; None: wait without limit."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
