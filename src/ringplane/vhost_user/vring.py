"""The state of one ring that the front end has set up so far, before and while a worker serves it."""

from __future__ import annotations

import contextlib
import os
import select
from dataclasses import astuple, dataclass, field

from ringplane.dataplane.queue import Queue
from ringplane.dataplane.worker import Worker
from ringplane.vhost_user.inband import InbandSignal
from ringplane.vhost_user.messages import BackendRequest, VringAddr
from ringplane.vhost_user.snapshot import Fd, VringSnapshot


@dataclass(slots=True)
class Vring:
    """A ring; a missing fd is -1, and the code that replaces an fd closes it."""

    queue: Queue
    worker: Worker
    size: int = 0
    base: int = 0
    address: VringAddr | None = None
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1
    enabled: bool = False
    running: bool = False
    # Notifications sent in band, by message; `call_told`: a SET_VRING_CALL has set how to notify the driver.
    signals: dict[BackendRequest, InbandSignal] = field(default_factory=dict)
    call_told: bool = False

    def has_full_notifier(self) -> bool:
        """Whether its worker may be waiting for the front end to make room in the call or error fd."""
        fds = [fd for fd in (self.call_fd, self.err_fd) if fd >= 0]
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLOUT)
        return len(poll.poll(0)) < len(fds)

    def snapshot(self) -> VringSnapshot:
        return VringSnapshot(
            size=self.size,
            base=self.base,
            address=list(astuple(self.address)) if self.address is not None else None,
            kick=Fd.of(self.kick_fd),
            call=Fd.of(self.call_fd),
            err=Fd.of(self.err_fd),
            enabled=self.enabled,
            call_told=self.call_told,
            broken=int(self.queue.record["broken"]),
        )

    def resume_from(self, saved: VringSnapshot) -> None:
        """Take over the state of another process; raises OSError if there are too many fds."""
        self.size, self.base = saved.size, saved.base
        self.address = VringAddr(*saved.address) if saved.address is not None else None
        self.kick_fd, self.call_fd, self.err_fd = (_duplicate(fd) for fd in (saved.kick, saved.call, saved.err))
        self.enabled, self.call_told = saved.enabled, saved.call_told
        # No worker uses the queue yet.
        self.queue.record["call_fd"], self.queue.err_fd = self.call_fd, self.err_fd
        self.queue.record["broken"], self.queue.broken_reported = saved.broken, bool(saved.broken)


def replace_fd(old: int, new: int) -> int:
    """Close the old fd, if there is one; returns the new one."""
    if old >= 0:
        # An error of close(2) (of a file that could not be written, for example) is the front end's problem.
        with contextlib.suppress(OSError):
            os.close(old)
    return new


def _duplicate(fd: Fd | None) -> int:
    return os.dup(fd.number) if fd is not None else -1
