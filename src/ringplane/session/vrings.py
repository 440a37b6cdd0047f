"""All rings of one front end, and how the control plane waits for their workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

from ringplane.dataplane.worker import WorkerEnded
from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import BadMemory
from ringplane.inflight.area import InflightArea
from ringplane.log.logs import DiskLog
from ringplane.session.refusal import Refused
from ringplane.session.vring import Result, RingUse, Vring

# Seconds after which a front end is suspected of holding up a worker.
SUSPICIOUS_WAIT = 0.1


class Vrings:
    """The rings of a disk's queues, for one front end."""

    def __init__(self, disk: Disk, logger: DiskLog) -> None:
        self._logger = logger
        pairs = zip(disk.queues, disk.workers, strict=True)
        self._all = [Vring(queue, worker, self._wait, logger) for queue, worker in pairs]

    def __iter__(self) -> Iterator[Vring]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Vring:
        """Raises Refused if there is no such ring."""
        if index >= len(self._all):
            raise Refused(f"queue {index} does not exist; there are {len(self._all)}")
        return self._all[index]

    @property
    def served(self) -> bool:
        """Whether any of them is."""
        return any(vring.queue.state.served for vring in self)

    async def stop_all(self) -> Sequence[Vring]:
        """Returns the rings that were running."""
        running = [vring for vring in self if vring.queue.state.served]
        await asyncio.gather(*(vring.stop() for vring in running))
        return running

    @contextlib.asynccontextmanager
    async def stopped(self, patience: float | None, use: Callable[[], RingUse]) -> AsyncIterator[bool]:
        """Nothing is fetched in this `async with`; whether all fetched requests have completed in so many seconds.

        At its end the rings that ran run again, whatever is in flight, as `use` says then.
        """
        running = [vring for vring in self if vring.queue.state.served]
        drained = await _in_time(patience, self.stop_all())
        try:
            yield drained
        finally:
            again = Vring.adjust if drained else Vring.call_off_stop
            await self._each(running, lambda vring: again(vring, use()))

    async def start_again(self, vrings: Iterable[Vring], use: RingUse) -> None:
        """Start these, and log it if one cannot start."""
        await self._each(vrings, lambda vring: vring.adjust(use))

    async def _each(self, vrings: Iterable[Vring], start: Callable[[Vring], Awaitable[None]]) -> None:
        for vring in vrings:
            try:
                await start(vring)
            except (BadMemory, OSError, WorkerEnded) as error:
                self._logger.warning("queue %d: cannot be started again: %s", vring.queue.number, error)

    async def stop_changed(self, use: RingUse) -> Sequence[Vring]:
        """Stop the running rings that are to be used in another way than before; returns them."""
        changed = [vring for vring in self if vring.is_changed_by(use)]
        await asyncio.gather(*(vring.stop() for vring in changed))
        return changed

    async def adjust(self, vrings: Iterable[Vring], use: RingUse) -> None:
        """Bring each of these into the state that the messages require, even if others fail; raises the first error."""
        errors: list[Exception] = []
        for vring in vrings:
            try:
                await vring.adjust(use)
            except (BadMemory, OSError, WorkerEnded) as error:
                errors.append(error)
        try:
            if errors:
                raise errors[0]
        finally:
            # Its traceback refers to this frame: see `Session._refuse`.
            errors.clear()

    async def disable_all(self) -> None:
        for vring in self:
            vring.enabled = False
        await asyncio.gather(*(vring.stop() for vring in self))

    async def end_all(self, area: InflightArea | None) -> None:
        """Stop all for good."""
        await asyncio.gather(*(vring.end(area) for vring in self))

    async def forget_all(self) -> list[BaseException]:
        """Release all resources of each ring, even if others fail; returns the errors."""
        results = await asyncio.gather(*(vring.forget() for vring in self), return_exceptions=True)
        return [error for error in results if error is not None]

    async def abandon_kept(self) -> None:
        """Until all have stopped, end the requests that layers keep; see ServedRings."""
        await asyncio.gather(*(vring.abandon_kept() for vring in self))

    async def set_memory(self, use: RingUse) -> None:
        await asyncio.gather(*(vring.set_memory(use) for vring in self))

    async def forwarded(self) -> None:
        """Return when the front end has acknowledged all notifications in band."""
        await asyncio.gather(*(vring.forwarded() for vring in self))

    async def _wait(self, future: Future[Result]) -> Result:
        """Wait for an operation of a worker, which completes it even when nobody waits any more.

        A front end must not be able to block the worker with a full notifier (signaller.py). Whether one blocks it
        cannot be seen, only whether one could.
        """
        waiting = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait([waiting], timeout=SUSPICIOUS_WAIT))[0]:
                for vring in self:
                    vring.interrupt_if_blocked()
            return waiting.result()
        finally:
            # See `_perform` of worker.py.
            del future, waiting


async def _in_time(patience: float | None, work: Awaitable[object]) -> bool:
    """Whether it has ended in so many seconds; None: however long it takes."""
    try:
        async with asyncio.timeout(patience):
            await work
    except TimeoutError:
        return False
    return True
