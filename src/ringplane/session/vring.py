"""One ring as the front end's messages set it up: its start and stop, its fds, and notifications in band."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from typing import Protocol, TypeVar

from ringplane.dataplane.place_ring import find_ring
from ringplane.dataplane.queue import DirtyLog, Queue, RingLayout
from ringplane.dataplane.ring_states import RingEvent, RingState
from ringplane.dataplane.worker import Worker, WorkerEnded
from ringplane.guest_memory.address_space import BadMemory
from ringplane.guest_memory.regions import MemoryTable
from ringplane.inflight.area import InflightArea
from ringplane.log.logs import DiskLog
from ringplane.session.inband import Ask, InbandSignal
from ringplane.session.refusal import Refused
from ringplane.session.snapshot import VringSnapshot
from ringplane.system.fd import Fd
from ringplane.vhost_user.messages import BackendRequest
from ringplane.vhost_user.payloads import VringAddr
from ringplane.virtio.features import VIRTIO_F_RING_PACKED
from ringplane.virtio.split import MAX_QUEUE_SIZE

Result = TypeVar("Result")

# Seconds after which a slow drain is logged.
SLOW_DRAIN = 2.0
# Seconds between two looks for what layers keep.
ABANDON_INTERVAL = 0.1


class Wait(Protocol):
    """Waits for an operation of a worker."""

    def __call__(self, future: Future[Result]) -> Awaitable[Result]: ...


@dataclass(frozen=True, slots=True)
class RingUse:
    """How all rings of a front end are used: what its other messages have set."""

    features: int
    write_through: bool
    memory: MemoryTable
    log: DirtyLog | None
    inflight: InflightArea | None
    # Sends a message on the back-end channel, if notifications are sent in band.
    ask: Ask | None
    # No ring runs until the disk is resumed.
    paused: bool = False

    @property
    def packed(self) -> bool:
        return bool(self.features & VIRTIO_F_RING_PACKED)


class Vring:
    """A ring. A missing fd is -1; the ring owns its fds."""

    def __init__(self, queue: Queue, worker: Worker, wait: Wait, logger: DiskLog) -> None:
        self.queue = queue
        self.enabled = False
        self._worker = worker
        self._wait = wait
        self._logger = logger
        self._size = self._base = 0
        self._address: VringAddr | None = None
        self._kick_fd = self._call_fd = self._err_fd = -1
        # Notifications sent in band, by message; `_call_set`: a SET_VRING_CALL has set how to notify the driver.
        self._signals: dict[BackendRequest, InbandSignal] = {}
        self._call_set = False

    # What messages describe.

    def set_size(self, size: int, *, packed: bool) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise Refused(f"ring size {size} is not from 1 to {MAX_QUEUE_SIZE}")
        if size & (size - 1) and not packed:
            raise Refused(f"ring size {size} is not a power of two")
        if size != self._size:
            self._refuse_if_running()
        self._size = size

    def set_address(self, address: VringAddr) -> None:
        for name, value, alignment in (
            ("descriptor", address.descriptor, 16),
            ("available", address.available, 2),
            ("used", address.used, 4),
        ):
            if value % alignment:
                raise Refused(f"the {name} address {value:#x} is not aligned to {alignment} bytes")
        if self._address is not None and _places(address) != _places(self._address):
            self._refuse_if_running()
        self._address = address

    def set_base(self, base: int, *, packed: bool) -> None:
        self._refuse_if_running()
        self._base = base if packed else base & 0xFFFF

    def _refuse_if_running(self) -> None:
        if self.queue.state.served:
            raise Refused("the ring is running")

    # Start and stop.

    async def adjust(self, use: RingUse) -> None:
        """Bring the ring into the state that the messages require; a broken one stays stopped until a reset.

        A suspended one stays stopped until its memory is added. Raises BadMemory and OSError if it cannot start.
        """
        if not self.enabled or use.paused:
            await self.stop()
        elif self._kick_fd >= 0 and self._size and self._address is not None and not self.queue.state.served:
            layout = self._layout(use, self._size, self._base, self._address)
            if self.queue.state is RingState.STOPPED_SUSPENDED and _is_shared(layout, use.memory):
                self.queue.ring_state.apply(RingEvent.MEMORY_CHANGED)
            if self.queue.state is RingState.STOPPED:
                await self._start(layout, use)

    async def _start(self, layout: RingLayout, use: RingUse) -> None:
        if use.ask is not None:
            await self._signal_in_band(use.ask)
        await self._wait(self._worker.start_queue(self.queue, layout, use.memory, self._kick_fd))

    def _layout(self, use: RingUse, size: int, base: int, address: VringAddr) -> RingLayout:
        area, number = use.inflight, self.queue.number
        return RingLayout(
            size=size,
            desc=address.descriptor,
            avail=address.available,
            used=address.used,
            base=base,
            features=use.features,
            write_through=use.write_through,
            log=use.log,
            inflight=area.region(number, size, packed=use.packed) if area is not None else None,
        )

    def is_changed_by(self, use: RingUse) -> bool:
        """Whether the ring runs and has to be restarted to be used in this way, even if it cannot start then."""
        layout, address = self.queue.layout, self._address
        if layout is None or address is None:
            return False
        try:
            return self._layout(use, layout.size, layout.base, address) != layout
        except BadMemory:
            return True

    async def stop(self) -> None:
        """Stop fetching and wait until all fetched requests have completed."""
        if not self.queue.state.served:
            return
        drained = self._worker.stop_queue(self.queue)
        try:
            await asyncio.wait_for(self._wait(drained), SLOW_DRAIN)
        except TimeoutError:
            self._logger.warning("queue %d: waiting for %d requests in flight", self.queue.number, self.queue.in_flight)
            await self._wait(drained)
        self._base = self.queue.base

    async def call_off_stop(self, use: RingUse) -> None:
        """After a cancelled `stop`: fetch again at once, whatever is in flight."""
        if await self._wait(self._worker.call_off_stop(self.queue, use.memory, self._kick_fd)):
            return
        self._base = self.queue.base
        await self.adjust(use)

    async def _reset(self) -> None:
        """Stop the ring and clear its error, if it was broken."""
        await self.stop()
        self.queue.reset()

    async def end(self, area: InflightArea | None) -> int:
        """Stop it for good: the next driver describes the ring again before it starts it. Returns its base."""
        await self._reset()
        if area is not None:
            area.forget(self.queue.number)
        self._address = None
        self._kick_fd = replace_fd(self._kick_fd, -1)
        return self._base

    async def forget(self) -> None:
        """Stop the ring and release all resources that the front end has sent for it."""
        try:
            await self._reset()
            if self.queue.record["call_fd"] >= 0:
                await self._wait(self._worker.set_call_fd(self.queue, -1))
        finally:
            # Also if the worker has ended: nobody uses them any longer.
            if self.queue.state is RingState.ABANDONED:
                self.queue.reset()
            self._kick_fd = replace_fd(self._kick_fd, -1)
            self._call_fd = replace_fd(self._call_fd, -1)
            self._err_fd = replace_fd(self._err_fd, -1)
            self.queue.err_fd = -1
            for request in list(self._signals):
                self._end_signal(request)
            self._call_set = False
            self._size, self._base, self._address, self.enabled = 0, 0, None, False

    async def abandon_kept(self) -> None:
        """The front end has gone. What a layer keeps, a policy that hangs for example, would keep the ring for ever."""
        while self.queue.state.served and self.queue.stack.layers:
            with contextlib.suppress(WorkerEnded):
                await self._wait(self._worker.call(lambda: self._worker.rings.abandon_kept(self.queue)))
            await asyncio.sleep(ABANDON_INTERVAL)

    async def set_memory(self, use: RingUse) -> None:
        if self.queue.state.served:
            await self._wait(self._worker.set_memory(self.queue, use.memory))
        elif self.queue.state.suspended:
            await self.adjust(use)

    # Kicks and notifications. Each method that takes an fd takes it over; -1: none.

    def set_kick(self, fd: int) -> None:
        """The ring has been stopped."""
        self._kick_fd = replace_fd(self._kick_fd, fd)

    async def kick(self, use: RingUse) -> None:
        """A kick in band: the first one starts the ring. The data plane is still kicked through an eventfd."""
        if self._kick_fd < 0:
            self._kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        await self.adjust(use)
        await self._wait(self._worker.signal(self._kick_fd))

    async def set_call(self, fd: int) -> None:
        self._call_set = True
        try:
            await self._wait(self._worker.set_call_fd(self.queue, fd))
        finally:
            self._call_fd = replace_fd(self._call_fd, fd)
        self._end_signal(BackendRequest.VRING_CALL)
        # Requests that completed before this fd was known are announced now; QEMU's own tests rely on it.
        if fd >= 0:
            await self._wait(self._worker.signal(fd))

    async def set_err(self, fd: int) -> None:
        try:
            await self._use_err_fd(fd)
        finally:
            self._err_fd = replace_fd(self._err_fd, fd)
        self._end_signal(BackendRequest.VRING_ERR)

    async def _use_err_fd(self, fd: int) -> None:
        await self._wait(self._worker.call(lambda: setattr(self.queue, "err_fd", fd)))

    async def _signal_in_band(self, ask: Ask) -> None:
        """Notify the front end by messages if it has not sent an fd."""
        if not self._call_set and BackendRequest.VRING_CALL not in self._signals:
            fd = self._begin_signal(BackendRequest.VRING_CALL, ask)
            await self._wait(self._worker.set_call_fd(self.queue, fd))
        if self._err_fd < 0 and BackendRequest.VRING_ERR not in self._signals:
            await self._use_err_fd(self._begin_signal(BackendRequest.VRING_ERR, ask))

    def _begin_signal(self, request: BackendRequest, ask: Ask) -> int:
        signal = self._signals[request] = InbandSignal(ask, request, self.queue.number, self._logger)
        return signal.fd

    def _end_signal(self, request: BackendRequest) -> None:
        """Close its fd, which the worker no longer uses."""
        signal = self._signals.pop(request, None)
        if signal is not None:
            signal.close()

    async def forwarded(self) -> None:
        """Return when the front end has acknowledged all notifications in band."""
        await asyncio.gather(*(signal.forwarded() for signal in self._signals.values()))

    def interrupt_if_blocked(self) -> None:
        """Interrupt the worker if it may be waiting for the front end to make room in the call or error fd."""
        fds = [fd for fd in (self._call_fd, self._err_fd) if fd >= 0]
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLOUT)
        if len(poll.poll(0)) < len(fds):
            self._worker.interrupt()

    # Handing over to another process, and taking over from one.

    def snapshot(self) -> VringSnapshot:
        return VringSnapshot(
            size=self._size,
            base=self._base,
            address=list(astuple(self._address)) if self._address is not None else None,
            kick=Fd.of(self._kick_fd),
            call=Fd.of(self._call_fd),
            err=Fd.of(self._err_fd),
            enabled=self.enabled,
            call_set=self._call_set,
            broken=int(self.queue.record["broken"]),
        )

    def resume_from(self, saved: VringSnapshot) -> None:
        """Take over the state of another process; raises OSError if there are too many fds."""
        self._size, self._base = saved.size, saved.base
        self._address = VringAddr(*saved.address) if saved.address is not None else None
        self._kick_fd, self._call_fd, self._err_fd = (_duplicate(fd) for fd in (saved.kick, saved.call, saved.err))
        self.enabled, self._call_set = saved.enabled, saved.call_set
        # No worker uses the queue yet.
        self.queue.record["call_fd"], self.queue.err_fd = self._call_fd, self._err_fd
        if saved.broken:
            self.queue.take_over_broken(saved.broken)


def _is_shared(layout: RingLayout, memory: MemoryTable) -> bool:
    try:
        find_ring(layout, memory)
    except BadMemory:
        return False
    return True


def replace_fd(old: int, new: int) -> int:
    """Close the old fd, if there is one; returns the new one."""
    if old >= 0:
        # An error of close(2) (of a file that could not be written, for example) is the front end's problem.
        with contextlib.suppress(OSError):
            os.close(old)
    return new


def _duplicate(fd: Fd | None) -> int:
    return os.dup(fd.number) if fd is not None else -1


def _places(address: VringAddr) -> tuple[int, int, int]:
    return address.descriptor, address.used, address.available
