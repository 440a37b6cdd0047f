"""The recording of a disk: it is begun, gets marks and is ended while a guest uses the disk."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ringplane.block.layers.record import RecordLayer
from ringplane.control.operation_errors import Unavailable, WrongState
from ringplane.device.disk import Disk
from ringplane.log.event_bus import Emit
from ringplane.system.aside import aside

if TYPE_CHECKING:
    from ringplane.block.layers.recording_file import RecordingFile

Result = TypeVar("Result")

# What is wrong, where, and what to do.
NOT_RECORDED = ("the disk is not recorded", "", "begin a recording before")

# Seconds after which a mark is tried again, for which the recording had no room.
MARK_INTERVAL = 0.01

# Seconds that the file has at the end of a recording: until there is room in memory for the last entries, and until it
# has all of them.
FILE_PATIENCE = 5.0

# Whoever asks again would ask for a second one.
LATER = "it continues; show the recording later to see whether the disk is recorded"


class Take(Protocol):
    """Does something while no other operation on the disk is done."""

    def __call__(
        self, operation: str, work: Callable[[], Coroutine[Any, Any, Result]], *, later: str
    ) -> Awaitable[Result]: ...


class Stopped(Protocol):
    """Does something while nothing is fetched and no front end attaches; it gets whether nothing is in flight."""

    def __call__(self, work: Callable[[bool], Awaitable[None]]) -> Awaitable[None]: ...


class DiskRecording:
    """All that can be done with it. Each method raises an OperationError if it cannot be done."""

    def __init__(
        self,
        disk: Disk,
        take: Take,
        stopped: Stopped,
        while_drained: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]],
        record_to: Callable[[Path], RecordLayer],
        emit: Emit,
    ) -> None:
        """`while_drained`: as `stopped`, if nothing is in flight; `record_to` opens a new recording."""
        self._disk, self._record_to, self._emit = disk, record_to, emit
        self._take, self._stopped, self._while_drained = take, stopped, while_drained

    @property
    def layer(self) -> RecordLayer | None:
        """What records the disk now, if it is recorded. Any thread may ask."""
        return next((layer for layer in self._disk.layers if isinstance(layer, RecordLayer)), None)

    async def start(self, path: Path) -> RecordLayer:
        """Record to this new file from now on; nothing is in flight at its beginning."""
        return await self._take("the start of a recording", lambda: self._start(path), later=LATER)

    async def end(self) -> RecordLayer:
        """Record no more; when this returns the file is complete.

        What is in flight, because storage or a policy does not answer, is in it as unfinished.
        """
        return await self._take("the end of a recording", self._end, later=LATER)

    async def mark(self, text: str) -> None:
        """Add a mark to the recording: requests that had ended before it is asked for are before it."""
        await self._take(
            "a mark", lambda: self._mark(text), later="it is added in its turn, if the file has room for it"
        )

    async def _start(self, path: Path) -> RecordLayer:
        if present := self.layer:
            raise WrongState(
                f"it is recorded already, to {present.file.path}", self._disk.name, "end that recording before"
            )
        layer = await aside(partial(self._record_to, path))
        try:
            layer.file.start(self._emit)
            await self._while_drained(partial(self._disk.add_lowest, layer))
        except BaseException:
            await aside(layer.close)
            await aside(layer.unlink)
            raise
        layer.file.announce()
        return layer

    async def _end(self) -> RecordLayer:
        layer = self._present()
        await self._stopped(lambda drained: self._leave(layer))
        # Another thread writes the rest: whatever happens to the file, the disk is served, and can be recorded again.
        layer.abandon()
        if not await aside(partial(layer.file.wait, FILE_PATIENCE)):
            raise self._incomplete(layer.file)
        return layer

    def _incomplete(self, file: RecordingFile) -> Unavailable:
        return Unavailable(
            f"{file.path}: its storage does not answer; the disk is not recorded any more, and {file.waiting} bytes of "
            "the recording are not in the file",
            self._disk.name,
            "what came after them is missing from it" if file.failed else "they are, when its storage has answered",
        )

    def end_at_once(self) -> None:
        """The process ends, whatever hangs: what is in flight is in the recording, as unfinished. It may block.

        If it cannot be done, the recording has no end, and its readers report that. Raises WorkerEnded.
        """
        layer = self.layer
        if layer and all(left.result() for left in self._disk.leave_lowest(len(self._disk.layers) - 1)):
            layer.close()

    async def _leave(self, layer: RecordLayer) -> None:
        try:
            async with asyncio.timeout(FILE_PATIENCE):
                await self._disk.remove_lowest()
        except TimeoutError:
            layer.file.give_up(errno.ETIMEDOUT)
            await self._disk.remove_lowest()

    async def _mark(self, text: str) -> None:
        file = self._present().file
        try:
            async with asyncio.timeout(FILE_PATIENCE):
                while not (file.failed or file.mark(text.encode())):
                    await asyncio.sleep(MARK_INTERVAL)
        except TimeoutError:
            # Whoever ends the recording for that waits for the turn.
            raise Unavailable(
                f"{file.path}: its storage does not answer, and there is no room for the mark",
                self._disk.name,
                "try again when it answers, or end the recording",
            ) from None
        if file.failed:
            right = "end the recording; another one needs another file"
            raise WrongState(f"nothing is recorded any more: {file.failed}", self._disk.name, right)

    def _present(self) -> RecordLayer:
        if layer := self.layer:
            return layer
        raise WrongState(*NOT_RECORDED)
