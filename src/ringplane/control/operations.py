"""What can be done with a disk while it is served: drain, pause, resume, flush, resize.

Each is a coroutine of the control thread, which returns when it is done, and raises an OperationError if it cannot be.
One at a time is done on a disk. The signals, the methods of `Export` and the API all use them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ringplane.block.layers.record import RecordLayer
from ringplane.control.changing import Changing
from ringplane.control.disk_errors import operation_errors
from ringplane.control.disk_recording import DiskRecording
from ringplane.control.front_ends import FrontEnds
from ringplane.control.limiting import Limiting, Present
from ringplane.control.operation_errors import OperationError, Unavailable, WrongState, WrongValue
from ringplane.control.turns import AGAIN, Around, Turns
from ringplane.dataplane import limit_gate
from ringplane.dataplane.compile_data_plane import warm_up
from ringplane.device.disk import Disk
from ringplane.log.event_bus import Emit
from ringplane.log.logs import DiskLog
from ringplane.opener.opener import Opener
from ringplane.options.counted import counted
from ringplane.options.limit_options import Limits, merge_limits
from ringplane.session.refusal import Refused
from ringplane.session.session import Session
from ringplane.system.aside import aside
from ringplane.system.confinement import is_confined
from ringplane.system.notes import in_words

if TYPE_CHECKING:
    from ringplane.control.policing import Policing

Result = TypeVar("Result")

# Seconds that a guest waits at most, while nothing is fetched, for what is in flight.
DRAIN_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Resized:
    """The size of a disk in bytes, before and now."""

    before: int
    now: int


class Operations:
    """Those of one disk."""

    def __init__(
        self,
        disk: Disk,
        session: Callable[[], Session | None],
        front_ends: FrontEnds,
        limiting: Limiting,
        changing: Changing,
        logger: DiskLog,
        emit: Emit,
        record_to: Callable[[Path], RecordLayer],
        opener: Opener,
    ) -> None:
        """`session`: that of the front end that is attached now, if one is; `record_to` opens a new recording.

        `opener` opens files of policies.
        """
        self._disk, self._session, self._front_ends, self._opener = disk, session, front_ends, opener
        self._limiting, self._changing, self._logger, self._emit = limiting, changing, logger, emit
        self._turns = Turns(disk.name, waits_for=self._in_flight)
        self.recording = DiskRecording(disk, self._take, self._stopped, self._while_drained, record_to, emit)

    def end(self) -> None:
        """The disk has stopped."""
        self._turns.end()
        if "policies" in vars(self):
            self.policies.end()

    async def hold(self, patience: float) -> None:
        """Begin none until `release`. Raises Unavailable if one that has begun does not end in `patience` seconds."""
        await self._turns.hold(patience)

    def release(self) -> None:
        """The end of `hold`."""
        self._turns.release()

    @property
    def _requests(self) -> int:
        return sum(queue.in_flight for queue in self._disk.started)

    def _in_flight(self) -> str:
        requests = self._requests
        return f"{counted(requests, 'request')} in flight, storage does not answer" if requests else ""

    async def drain(self) -> None:
        """Return when all fetched requests have completed; nothing is fetched meanwhile."""
        await self._take("drain", self._drain)

    async def pause(self) -> None:
        """Fetch nothing from now on; returns when all fetched requests have completed.

        Requests of the guest wait in its rings until `resume`. The disk stays paused when its front end detaches and
        another one attaches.
        """
        await self._change("pause", self._pause)

    async def resume(self) -> None:
        """Fetch again after `pause`."""
        await self._change("resume", self._resume)

    async def flush(self) -> None:
        """Make all completed requests stable."""
        await self._take("flush", self._flush)

    async def resize(self, size: int | None = None) -> Resized:
        """Pick up the size that the source has now; with `size`, make a regular file this long first.

        The front end is notified of a change.
        """
        return await self._take("resize", lambda: self._resize(size))

    async def change_limits(self, changes: Limits) -> Present:
        """Change these limits; 0 or None removes one. Returns all that hold now.

        Requests that wait because of a limit begin at once if the new one allows it.
        """
        return await self._change("a change of limits", lambda: self._change_limits(changes))

    @cached_property
    def policies(self) -> Policing:
        """What can be done with its policies."""
        # Few disks have any.
        from ringplane.control.policing import Policing

        return Policing(self._disk, self._changing, self._take, self._logger, self._emit, self._opener)

    async def _change(self, operation: str, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """As `_take`, for what the next process has to learn of.

        A change that waits because another process takes over must not have its turn: that process waits for turns.
        """
        return await self._take(operation, work, self._changing.one)

    async def _take(
        self,
        operation: str,
        work: Callable[[], Coroutine[Any, Any, Result]],
        around: Around = contextlib.nullcontext,
        later: str = AGAIN,
    ) -> Result:
        """Raises OperationError for all that can happen; `later`: what to do if it has not ended in time."""
        with operation_errors(operation, self._disk.name):
            return await self._turns.take(operation, work, around=around, later=later)

    async def _drain(self) -> None:
        if session := self._session():
            await session.drain(_nothing)

    async def _pause(self) -> None:
        # First, so that no ring starts meanwhile.
        self._disk.paused = True
        if session := self._session():
            await session.pause()
        try:
            await self._disk.empty_cache()
        except OSError as error:
            raise Unavailable(
                f"it is paused, but its cache could not be written: {in_words(error)}", self._disk.name
            ) from None
        self._logger.info("paused")
        self._emit("paused")

    async def _resume(self) -> None:
        self._disk.paused = False
        if session := self._session():
            await session.resume()
        self._logger.info("resumed")
        self._emit("resumed")

    async def _flush(self) -> None:
        # The state of a layer may not change while it is written.
        stateful = any(layer.has_state for layer in self._disk.layers)
        await (self._while_drained(self._sync) if stateful else self._sync())

    async def _stopped(self, work: Callable[[bool], Awaitable[None]]) -> None:
        """Do it while nothing is fetched and no front end attaches; it gets whether nothing is in flight.

        Requests in flight have some time to end. Raises Unavailable.
        """
        with self._front_ends.held():
            session = self._session()
            try:
                await (work(True) if session is None else session.drain(work, DRAIN_PATIENCE))
            except Refused as error:
                raise Unavailable(str(error), self._disk.name, "try again when storage answers") from None

    async def _while_drained(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do it while nothing is in flight. Raises Unavailable if requests do not end; the guest continues then."""

        async def if_drained(drained: bool) -> None:
            if not drained:
                raise self._hanging()
            await work()

        await self._stopped(if_drained)

    def _hanging(self) -> Unavailable:
        return Unavailable(
            f"nothing was done: {counted(self._requests, 'request')} in flight did not end in {DRAIN_PATIENCE:g} s",
            self._disk.name,
            "release what a policy holds, or try again when storage answers",
        )

    async def _sync(self) -> None:
        await aside(self._disk.sync)

    async def _change_limits(self, changes: Limits) -> Present:
        try:
            limits = merge_limits(self._limiting.limits_of(self._disk), changes)
        except ValueError as error:
            raise WrongValue(str(error), "limits", "docs/limits.md lists the keys") from None
        await aside(self._prepare_limits)
        await self._limiting.change(self._disk, limits)
        present = self._limiting.limits_of(self._disk)
        words = ", ".join(f"{key}={value}" for key, value in present.items())
        self._logger.info("limits: %s", words or "none")
        self._emit("limits-changed", limits=present)
        return present

    def _prepare_limits(self) -> None:
        if not is_confined():
            warm_up(limit_gate.UNITS)
        elif not all(unit.is_loaded for unit in limit_gate.UNITS):
            raise WrongState(
                "this process may not load code any more, so its disks cannot be limited",
                self._disk.name,
                "start it with a limit for one of its disks, with an API, or with --no-sandbox",
            )
        self._disk.prepare_limits()

    async def _resize(self, size: int | None) -> Resized:
        if size is None and (why := await aside(lambda: self._disk.source.replaced)):
            self._logger.warning("%s", why)
        before = self._disk.size
        if size is not None:
            await aside(lambda: self._disk.grow_source(size))
        if not await self._disk.refresh_size():
            self._logger.info("has %d bytes, unchanged", before)
            return Resized(before, before)
        now = self._disk.size
        self._logger.info("has %d bytes now", now)
        self._emit("resized", before=before, size=now)
        if session := self._session():
            await session.notify_config_change()
        return Resized(before, now)


async def logging_errors(work: Awaitable[object], logger: DiskLog, prefix: str) -> None:
    """For operations whose result nobody waits for: the log says why one failed."""
    try:
        await work
    except OperationError as error:
        logger.warning("%s: %s", prefix, error)
    except asyncio.CancelledError:
        raise


async def _nothing(drained: bool) -> None:
    """For a drain alone."""
