"""A disk being served: its handle for the program, and the task that serves its front ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from ringplane.block.layers.record import RecordLayer
from ringplane.control.changing import Changing
from ringplane.control.counters import Counter, count
from ringplane.control.front_ends import FrontEnds
from ringplane.control.limiting import Limiting, Present
from ringplane.control.listener import Listener
from ringplane.control.operation_errors import OperationError, WrongState
from ringplane.control.operations import Operations, Resized, logging_errors
from ringplane.control.planned import Planned
from ringplane.control.threads import Threads
from ringplane.dataplane.trace_events import TraceEvent
from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import Quota
from ringplane.log.event_bus import Emit
from ringplane.log.logs import DiskLog
from ringplane.opener.opener import Opener
from ringplane.options.limit_options import Limits
from ringplane.options.policy_options import PolicyUse
from ringplane.options.process_rules import identity
from ringplane.session.session import Session
from ringplane.session.snapshot import SessionSnapshot
from ringplane.system.aside import NoThread, aside
from ringplane.vhost_user import peers
from ringplane.vhost_user.transport import AsyncTransport

log = logging.getLogger(__name__)

STOP_LOOK = 0.1

Result = TypeVar("Result")


class Export:
    """A disk served on a socket by threads of this process. Made by `serve` and `serve_all`."""

    def __init__(
        self,
        planned: Planned,
        disk: Disk,
        listener: Listener,
        threads: Threads,
        quota: Quota,
        limiting: Limiting,
        changing: Changing,
        emit: Emit,
        record_to: Callable[[Path], RecordLayer],
        opener: Opener,
    ) -> None:
        self.config, self.added = planned.config, planned.added
        # By which a disk with the same image is found. Later its storage may hang.
        self.image = identity(planned.config.image)
        self._limiting = limiting
        self._planned = planned
        disk.paused, disk.policies_changed = planned.paused, planned.policies_changed
        self.socket_path = listener.path
        self.threads = threads
        self.disk = disk
        self._logger, self._emit = DiskLog(log, disk.name), emit
        self._front_ends = FrontEnds(listener.sock, self._logger)
        self.operations = Operations(
            disk, lambda: self._session, self._front_ends, limiting, changing, self._logger, emit, record_to, opener
        )
        self._listener = listener
        self._quota = quota
        self._session: Session | None = None
        self._transport: AsyncTransport | None = None
        # Who is attached, for log lines.
        self._attached = ""
        self._stopping = self._handed_over = False
        self._finished = threading.Event()

    @property
    def name(self) -> str:
        """The name of the disk; no two disks of a process have the same."""
        return self.disk.name

    @property
    def state(self) -> Literal["listening", "attached", "stopping", "stopped"]:
        """`listening`, `attached` (to a front end), `stopping` (its storage has not ended yet) or `stopped`."""
        if self.stopped:
            return "stopped"
        if self._stopping:
            return "stopping"
        return "attached" if self._session else "listening"

    @property
    def stopped(self) -> bool:
        """Whether it has stopped, and nothing of it is left."""
        return self._finished.is_set()

    @property
    def in_flight(self) -> int:
        """Requests fetched from the rings and not yet completed."""
        return sum(queue.in_flight for queue in self.disk.started)

    @property
    def counters(self) -> dict[str, Counter]:
        """By kind of request: `read`, `write`, `flush`, `discard`, `write_zeroes` and `other`."""
        return count(self.disk.started)

    @property
    def limits(self) -> Present:
        """The limits that hold now, with those of its group, by their names in a configuration file."""
        return self._limiting.limits_of(self.disk)

    @property
    def limits_changed(self) -> bool:
        """Whether they were changed at run time."""
        return self._limiting.is_changed(self.disk)

    @property
    def policies(self) -> Sequence[PolicyUse]:
        """Its policies as they are now, in order."""
        if not self.disk.policies_changed:
            return self.config.policy
        return tuple(each.use for each in self.disk.running_policies)

    @property
    def throttled(self) -> float:
        """Seconds in which requests waited in its rings because of a limit."""
        return self.disk.member.throttled

    @property
    def paused(self) -> bool:
        """Whether the guest's requests wait in its rings, because of `pause`."""
        return self.disk.paused

    @property
    def front_end(self) -> str:
        """The attached front end, for people; empty: there is none."""
        return self._attached if self._session else ""

    def drain(self) -> None:
        """Return when all fetched requests have completed; nothing is fetched meanwhile."""
        try:
            self._do(self.operations.drain)
        except OperationError as error:
            # A stop drains too.
            if not self.stopped:
                self._logger.warning("cannot be drained: %s", error)

    def pause(self) -> None:
        """Complete all fetched requests, and fetch nothing until `resume`. Raises OperationError."""
        self._do(self.operations.pause)

    def resume(self) -> None:
        """Fetch again after `pause`. Raises OperationError."""
        self._do(self.operations.resume)

    def flush(self) -> None:
        """Make all completed requests stable. Raises OperationError."""
        self._do(self.operations.flush)

    def resize(self, size: int | None = None) -> Resized:
        """Pick up the size of the image; with `size`, make a regular file this long before. Raises OperationError."""
        return self._do(lambda: self.operations.resize(size))

    def change_limits(self, changes: Limits) -> None:
        """Change these limits, for example `{"total-iops-sec": 20000}`; 0 or None removes one. Raises OperationError.

        When this returns they hold, also for requests that waited because of the previous ones.
        """
        self._do(lambda: self.operations.change_limits(changes))

    def set_policies(self, policies: Sequence[PolicyUse]) -> None:
        """Have these policies, in this order, and no others. Raises OperationError; then nothing has changed.

        When this returns, all requests that are fetched from now on pass them. One that stays, by its name and the text
        of its file, keeps its state and counters. Requests that hang because of one that is gone or off continue.
        """
        self._do(lambda: self.operations.policies.set(policies))

    def start_recording(self, path: str | os.PathLike[str]) -> str:
        """Record all changes to this new file from now on; returns the token of marks. Raises OperationError."""
        return self._do(lambda: self.operations.recording.start(Path(path))).file.token

    def end_recording(self) -> None:
        """Record no more; when this returns the file is complete. Raises OperationError."""
        self._do(self.operations.recording.end)

    def mark(self, text: str) -> None:
        """Add a mark to the recording. Raises OperationError."""
        self._do(lambda: self.operations.recording.mark(text))

    def _do(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The result of a coroutine on the control thread."""
        gone = WrongState("has stopped", self.name)
        try:
            done = self.threads.call(work)
        except RuntimeError:
            raise gone from None
        while True:
            try:
                return done.result(STOP_LOOK)
            except CancelledError:
                raise gone from None
            except TimeoutError:
                if self.threads.wait(0):
                    raise gone from None

    def refresh_size(self) -> None:
        """Begin to pick up the new size of the source, and return; the log says if that is impossible."""
        self.threads.start_task(
            lambda: logging_errors(self.operations.resize(), self._logger, "its new size cannot be served")
        )

    def make_way(self) -> None:
        """Detach the attached front end if another one waits."""
        self.threads.soon(self._make_way)

    def trace(self, receive: Callable[[TraceEvent | str], None]) -> None:
        """Call `receive` with each trace event from now on, or a text about lost ones, on the control thread."""
        if self.stopped:
            return

        def receive_ours(event: TraceEvent | str) -> None:
            if isinstance(event, str) or event.disk == self.name:
                receive(event)

        self.threads.trace(receive_ours)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the export has stopped (its one inherited connection may end by itself); whether it has."""
        return self._finished.wait(timeout)

    def request_stop(self) -> None:
        """Begin to stop and return at once; may be called from a signal handler."""
        if not self._stopping:
            self._stopping = True
            self.threads.soon(self._close_sockets)

    def stop(self) -> None:
        """Fetch nothing more, complete what is in flight, release front end, socket and source. May be called again.

        The last disk on its threads ends them.
        """
        self.request_stop()
        self._finished.wait()
        self.threads.end_if_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # On the control thread.

    def apply_limits(self) -> None:
        """Before the first front end; on the control thread, if it runs."""
        self._limiting.add(self.disk, self.config.limits, changed=self._planned.limits_changed)

    def used_limits(self) -> dict[str, Any] | None:
        """How much of its limits is used, for another process."""
        return self._limiting.snapshot(self.disk)

    def resume_limits(self, used: Mapping[str, Any]) -> None:
        """So much of them was used in the previous process; before any disk is used."""
        self._limiting.resume_from(self.disk, used)

    async def run(self) -> None:
        """Serve until stopped; called by its threads. A failure here affects only this disk."""
        try:
            await self._serve()
        except Exception:
            self._logger.exception("stopped serving because of an internal error; please report it")
        finally:
            self.operations.end()
            self._limiting.remove(self.disk)
            # Storage that hangs must not stop other disks.
            try:
                await closed(self.disk.close)
            except Exception:
                self._logger.exception("could not be closed because of an internal error; please report it")
            finally:
                self._quota.end()
                # Whoever stops it waits for this.
                self._finished.set()

    async def _serve(self) -> None:
        """One front end after the other; others that connect meanwhile wait in the socket's queue."""
        listener = self._listener
        try:
            self.disk.source.watch(self.refresh_size)
            if listener.connected:
                await self._serve_front_end(listener.sock)
                return
            if self._session is not None:
                self._logger.info("resumed a front end of the previous process")
                await self._run_session(self._session)
            while not self._stopping:
                sock = await self._front_ends.next()
                if sock is not None:
                    await self._serve_front_end(sock)
        finally:
            self._front_ends.drop_waiting()
            if listener.opener is None:
                listener.close()
            else:
                listener.sock.close()
                await closed(listener.close)

    async def _serve_front_end(self, sock: socket.socket) -> None:
        if self._stopping:
            sock.close()
            return
        self._attached = peers.describe(sock)
        self._transport = AsyncTransport(sock)
        try:
            self._session = Session(self._transport, self.disk, self._quota)
        except OSError as error:
            # For example too many open files: the next one may succeed.
            self._logger.warning("cannot serve a front end: %s", error)
            self._transport.close()
            self._transport = None
            return
        self._logger.info("front end attached (%s)", self._attached)
        self._emit("attached", front_end=self._attached)
        await self._run_session(self._session)

    async def _run_session(self, session: Session) -> None:
        watching = None if self._listener.connected else asyncio.create_task(self._front_ends.watch(self._attached))
        try:
            if not self._stopping:
                await session.run()
        except Exception:
            self._logger.exception("front end dropped because of an internal error; please report it")
        finally:
            if self._transport:
                self._transport.close()
            self._session = self._transport = None
            self.disk.report_failures()
            self._report_end()
            if watching is not None:
                watching.cancel()
                await asyncio.wait([watching])

    def _report_end(self) -> None:
        if self._handed_over:
            # The guest does not notice.
            self._logger.info("front end handed over")
            return
        self._logger.info("front end detached")
        self._emit("detached", front_end=self._attached)

    # For handing_over.py and taking_over.py.

    @property
    def listener(self) -> Listener:
        return self._listener

    @property
    def session(self) -> Session | None:
        return self._session

    @property
    def next_front_end(self) -> socket.socket | None:
        """The front end that waits until the attached one detaches."""
        return self._front_ends.waiting

    async def freeze(self, patience: float) -> None:
        """Stop all activity until `thaw`: no front end is accepted; `patience` and errors as for `Session.freeze`."""
        self._front_ends.freeze()
        try:
            if self._session:
                await self._session.freeze(patience)
        except BaseException:
            self._front_ends.thaw()
            raise

    async def thaw(self) -> None:
        """Continue after `freeze`."""
        if self._session:
            await self._session.thaw()
        self._front_ends.thaw()

    async def abandon(self) -> None:
        """After `freeze`: stop, and leave everything unchanged to the process that takes over."""
        self._listener.owned = False
        self._handed_over = True
        # What waits for its turn is not done here any more.
        self.operations.end()
        try:
            for layer in self.disk.layers:
                layer.abandon()
        finally:
            await self._abandon_front_ends()

    async def _abandon_front_ends(self) -> None:
        try:
            if self._session:
                await self._session.abandon()
        finally:
            self.request_stop()
            # Before anybody else can be accepted.
            self._front_ends.stop()
            self._front_ends.thaw()

    def resume_waiting(self, fd: int) -> None:
        """See FrontEnds.resume_waiting."""
        self._front_ends.resume_waiting(fd)

    def resume_from(self, saved: SessionSnapshot) -> None:
        """Serve from the start a front end that another process hands over; raises the same as Session.resume_from."""
        sock = socket.socket(fileno=os.dup(saved.socket.number))
        self._attached = peers.describe(sock)
        self._transport = AsyncTransport(sock)
        self._session = Session(self._transport, self.disk, self._quota)
        self._session.resume_from(saved)

    def _make_way(self) -> None:
        if self._transport is None:
            return
        if self._front_ends.waiting is None:
            self._logger.info("front end (%s) stays attached: no other one waits", self._attached)
            return
        self._logger.warning("front end (%s) is detached on request, because another one waits", self._attached)
        self._transport.close()

    def _close_sockets(self) -> None:
        self._front_ends.stop()
        if self._session is not None:
            self._session.give_up()
        if self._transport:
            self._transport.close()


async def closed(close: Callable[[], object]) -> None:
    """Call it on a thread that may block, if one can be started."""
    try:
        await aside(close)
    except NoThread:
        close()
