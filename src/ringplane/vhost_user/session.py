"""The back end's side of one vhost-user connection: acts on messages, and starts and stops rings.

Source: QEMU's docs/interop/vhost-user.rst; the ring states are those of its section "Ring states".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import astuple
from typing import TypeVar

from ringplane.dataplane.queue import DirtyLog, RingLayout
from ringplane.dataplane.worker import WorkerEnded
from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import Quota
from ringplane.guest_memory.regions import Alarm, BadMemory, Mapping, MemoryTable, Region
from ringplane.log.logs import DiskLog
from ringplane.vhost_user import inflight_area, messages
from ringplane.vhost_user.connection import Message, UnknownRequest, rule_of
from ringplane.vhost_user.fds import BadFd, check_fds
from ringplane.vhost_user.inband import BackendChannel, InbandSignal
from ringplane.vhost_user.inflight_area import InflightArea
from ringplane.vhost_user.messages import (
    MAX_CONFIG_SIZE,
    U64,
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    BackendRequest,
    Config,
    Inflight,
    LogRegion,
    MemoryRegion,
    Payload,
    ProtocolError,
    ProtocolFeature,
    Request,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
)
from ringplane.vhost_user.snapshot import Fd, SessionSnapshot, SharedMemory, SharedRegion
from ringplane.vhost_user.transport import AsyncTransport, Interrupted
from ringplane.vhost_user.vring import Vring, replace_fd
from ringplane.virtio.blk import CONFIG, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH
from ringplane.virtio.features import VIRTIO_F_RING_PACKED
from ringplane.virtio.split import MAX_QUEUE_SIZE

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.LOG_SHMFD
)

# Other features that in-band notifications require (section "In-band notifications").
INBAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK

# The device status, of virtio 1.2 section 2.1.
FEATURES_OK, DEVICE_NEEDS_RESET, STATUS_MASK = 8, 64, 0xFF

# The negative reply to requests that always get a reply: failed, with no fd.
NOES: dict[int, Payload] = {
    Request.GET_CONFIG: messages.Empty(),
    Request.GET_SHARED_OBJECT: messages.Opaque(),
    Request.SET_LOG_BASE: U64(1),
    Request.GET_INFLIGHT_FD: Inflight(0, 0, 0, 0),
    Request.SET_DEVICE_STATE_FD: U64(1 | VringFd.NO_FD),
    Request.CHECK_DEVICE_STATE: U64(1),
}

# KVM's limit for a guest (KVM_USER_MEM_SLOTS of x86); front ends do not need more.
MAX_MEMORY_SLOTS = 509

# Offset of the field in which the driver writes whether it flushes
WRITEBACK: int = CONFIG.fields["writeback"][1]  # type: ignore[index]

# Seconds after which a slow drain is logged.
TELL_AFTER = 2.0

# Seconds after which a front end is suspected of holding up a worker.
LOOK_AFTER = 0.1

# Seconds that a front end has to read a message that is being sent, before it is handed over.
FREEZE_PATIENCE = 1.0


class Refused(Exception):
    """A request that cannot be carried out; the text says why. The front end gets a negative reply, if any."""


class Session:
    """One front end, from its connection to its end."""

    def __init__(self, transport: AsyncTransport, disk: Disk, quota: Quota) -> None:
        self._transport = transport
        self._disk = disk
        self._quota = quota
        self._logger = DiskLog(log, disk.name)
        self._offered = disk.features | VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL
        self._features = 0
        self._protocol_features = ProtocolFeature(0)
        self._memory = MemoryTable()
        self._alarm = Alarm()
        self._channel: BackendChannel | None = None
        self._log: DirtyLog | None = None
        self._inflight: InflightArea | None = None
        self._status = 0
        self._features_refused = False
        self._reply_fds: list[int] = []
        self._vrings = [Vring(queue, worker) for queue, worker in zip(disk.queues, disk.workers, strict=True)]
        self._write_back = True
        self._busy = asyncio.Lock()
        # For `freeze`: `_paused` is set while no message is taken; the next one is taken when `_go` is set.
        self._paused, self._go = asyncio.Event(), asyncio.Event()
        self._go.set()
        self._held = contextlib.AsyncExitStack()

    async def run(self) -> None:
        """Serve the front end until it disconnects or breaks the protocol; then free all its resources."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._alarm.fd, self._end_without_memory)
        try:
            # A front end that was taken over has rings to start.
            await self._start_again(self._vrings)
            while await self._serve_one_message():
                pass
        except (ProtocolError, Refused) as error:
            self._logger.warning("front end dropped: %s", error)
        except OSError as error:
            self._logger.info("front end lost: %s", error)
        finally:
            loop.remove_reader(self._alarm.fd)
            await self._close()
            self._paused.set()

    def _end_without_memory(self) -> None:
        """Stop: requests may have been executed with zeros in place of their data, so this device cannot continue."""
        asyncio.get_running_loop().remove_reader(self._alarm.fd)
        self._logger.warning("front end dropped: it truncated memory that it shares with this disk (ftruncate(2))")
        self._transport.close()

    async def drain(self) -> None:
        """Complete all fetched requests while nothing more is fetched, then continue."""
        async with self._busy:
            await self._start_again(await self._stop_all())

    async def _stop_all(self) -> Sequence[Vring]:
        """Returns the rings that were running."""
        running = [vring for vring in self._vrings if vring.running]
        await asyncio.gather(*(self._stop(vring) for vring in running))
        return running

    async def _start_again(self, vrings: Sequence[Vring]) -> None:
        for vring in vrings:
            try:
                await self._start_or_stop(vring)
            except (BadMemory, OSError) as error:
                self._logger.warning("queue %d: cannot be started again: %s", vring.queue.number, error)

    # Handing over to another process, and taking over from one.

    async def freeze(self) -> None:
        """Stop all activity until `thaw`: no message is taken, no ring runs, and all fetched requests are completed.

        Raises Refused if the front end does not read, or has removed a ring's memory. Waits for all requests in flight.
        """
        async with contextlib.AsyncExitStack() as held:
            self._go.clear()
            held.callback(self._go.set)
            self._transport.interrupt()
            with _refusing("the front end does not read its replies"):
                async with asyncio.timeout(FREEZE_PATIENCE):
                    await self._paused.wait()
                    await held.enter_async_context(self._busy)
            if any(vring.queue.suspended for vring in self._vrings):
                raise Refused("the front end has removed the memory of a ring and has not added it again yet")
            held.push_async_callback(self._start_again, await self._stop_all())
            with _refusing("the front end does not read the back-end channel"):
                async with asyncio.timeout(FREEZE_PATIENCE):
                    await self._quieten(held)
            self._held = held.pop_all()

    async def _quieten(self, held: contextlib.AsyncExitStack) -> None:
        """Wait until nothing is under way on the channel to the front end."""
        await asyncio.gather(*(signal.forwarded() for vring in self._vrings for signal in vring.signals.values()))
        if self._channel is not None:
            await held.enter_async_context(self._channel.quiet)

    async def thaw(self) -> None:
        """Continue after `freeze`."""
        await self._held.aclose()

    async def abandon(self) -> None:
        """End after `freeze`, because another process resumes this front end: nothing is sent and nothing is read."""
        self._transport.close()
        for vring in self._vrings:
            vring.enabled = False
        await self._held.aclose()

    async def _pause(self) -> None:
        self._paused.set()
        await self._go.wait()
        self._paused.clear()

    def snapshot(self) -> SessionSnapshot:
        """The state that another process needs to resume; after `freeze`."""
        unfinished, fds = self._transport.connection.unfinished
        area = self._inflight
        return SessionSnapshot(
            socket=Fd(self._transport.fileno()),
            unfinished=unfinished,
            unfinished_fds=[Fd(fd) for fd in fds],
            features=self._features,
            features_refused=self._features_refused,
            protocol_features=int(self._protocol_features),
            status=self._status,
            write_back=self._write_back,
            regions=[
                SharedRegion(region.guest_address, region.user_address, _shared(region.mapping))
                for region in self._memory.regions
            ],
            log=_shared(self._log.mapping) if self._log is not None else None,
            inflight=list(astuple(area.described)) if area is not None else None,
            inflight_fd=Fd(area.fd) if area is not None else None,
            channel=Fd.of(self._channel.fileno()) if self._channel is not None else None,
            vrings=[vring.snapshot() for vring in self._vrings],
        )

    def resume_from(self, saved: SessionSnapshot) -> None:
        """Take over a front end from another process, before `run`, which starts its rings.

        Raises Refused, BadMemory, OSError and ProtocolError if the state does not fit this disk.
        """
        if saved.features & ~self._offered or saved.protocol_features & ~int(self._offered_protocol_features):
            raise Refused("the front end uses features that this disk does not offer")
        if len(saved.vrings) != len(self._vrings):
            raise Refused(f"the front end has {len(saved.vrings)} rings and this disk {len(self._vrings)} queues")
        self._transport.connection.receive_again(saved.unfinished, [os.dup(fd.number) for fd in saved.unfinished_fds])
        self._features, self._features_refused = saved.features, saved.features_refused
        self._protocol_features = ProtocolFeature(saved.protocol_features)
        self._status, self._write_back = saved.status, saved.write_back
        self._memory = MemoryTable(
            self._map(
                MemoryRegion(each.guest_address, each.memory.size, each.user_address, each.memory.offset),
                each.memory.fd.number,
            )
            for each in saved.regions
        )
        if saved.log is not None:
            self._log = self._map_log(saved.log.fd.number, saved.log.size, saved.log.offset)
        if saved.inflight is not None and saved.inflight_fd is not None:
            self._inflight = self._map_inflight(Inflight(*saved.inflight), saved.inflight_fd.number)
        if saved.channel is not None:
            self._channel = BackendChannel(os.dup(saved.channel.number))
        for vring, each in zip(self._vrings, saved.vrings, strict=True):
            vring.resume_from(each)

    async def notify_config_change(self) -> None:
        """Notify the front end, if it has a back-end channel, that the configuration space has changed."""
        if self._channel is None or ProtocolFeature.CONFIG not in self._protocol_features:
            self._logger.info("the front end cannot be notified; the driver sees the new size when it starts again")
            return
        try:
            await self._channel.notify(BackendRequest.CONFIG_CHANGE_MSG)
        except OSError as error:
            self._logger.warning("the front end could not be notified of the new size: %s", error or "it does not read")

    async def _close(self) -> None:
        self._transport.close()
        async with self._busy:
            # Stop each ring, even if others fail.
            results = await asyncio.gather(*(self._forget(vring) for vring in self._vrings), return_exceptions=True)
            for error in results:
                if error is not None:
                    self._logger.error("a queue could not be stopped: %s", error)
            self._memory, self._inflight, self._log = MemoryTable(), None, None
            self._close_channel()
            # Cancelled tasks may hold this object until the next garbage collection, but they must not hold the fd.
            del self._alarm

    async def _serve_one_message(self) -> bool:
        try:
            message = await self._transport.receive()
        except Interrupted:
            await self._pause()
            return True
        except UnknownRequest as unknown:
            await self._reply(unknown.message, self._refuse(unknown.message, Refused(str(unknown))))
            return True
        if message is None:
            return False
        with message:
            self._logger.debug("%s %s", message.name, message.payload)
            async with self._busy:
                reply = await self._answer(message)
            # Without the lock: a front end that does not read its replies must hold up only itself.
            if reply is not None:
                await self._reply(message, reply)
        return True

    async def _answer(self, message: Message) -> Payload | None:
        try:
            reply = await self._handle(message)
        except (Refused, BadMemory, BadFd, OSError, WorkerEnded) as error:
            return self._refuse(message, Refused(f"{message.name}: {error}"))
        return U64(0) if reply is None and self._wants_ack(message) else reply

    def _wants_ack(self, message: Message) -> bool:
        return message.need_reply and ProtocolFeature.REPLY_ACK in self._protocol_features

    async def _reply(self, message: Message, payload: Payload) -> None:
        fds, self._reply_fds = self._reply_fds, []
        try:
            await self._transport.send(self._transport.connection.reply(message, payload, fds), fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _refuse(self, message: Message, why: Refused) -> Payload:
        """Send a negative reply, or, if there is none, end the connection: its view of our state would be wrong."""
        if message.request in NOES:
            self._logger.warning("%s", why)
            return NOES[message.request]
        if self._wants_ack(message) and rule_of(message.request).reply is None:
            self._logger.warning("%s", why)
            return U64(1)
        try:
            raise why
        finally:
            # If a frame of its own traceback refers to it, the exception, and with it this front end's memory, stays
            # until the next garbage collection.
            del why

    async def _handle(self, message: Message) -> Payload | None:
        handler: Callable[..., Awaitable[Payload | None]] | None = None
        if isinstance(message.request, Request):
            handler = getattr(self, f"_on_{message.request.name.lower()}", None)
        feature = rule_of(message.request).feature
        if handler is None:
            raise Refused("not supported by this back end")
        if feature is not None and feature not in self._protocol_features:
            raise Refused(f"sent although the protocol feature {feature.name} was not negotiated")
        check_fds(message)
        return await handler(message)

    # Negotiation.

    async def _on_get_features(self, message: Message) -> Payload:
        return U64(self._offered)

    async def _on_set_features(self, message: Message) -> None:
        wanted = _u64(message)
        self._features_refused = True
        if wanted & ~self._offered:
            raise Refused(f"feature bits {wanted & ~self._offered:#x} were not offered")
        missing = self._disk.needed_features & ~wanted
        if missing:
            raise Refused(f"the driver did not accept the feature bits {missing:#x}, so it does not know zoned disks")
        self._features_refused = False
        self._features = wanted
        for vring in self._vrings:
            # Without protocol features there is no SET_VRING_ENABLE: rings are enabled from the start.
            vring.enabled = vring.enabled or not wanted & VHOST_USER_F_PROTOCOL_FEATURES
            if vring.running and self._uses_changed(vring):
                await self._stop(vring)
            await self._start_or_stop(vring)

    async def _on_get_protocol_features(self, message: Message) -> Payload:
        return U64(int(self._offered_protocol_features))

    async def _on_set_protocol_features(self, message: Message) -> None:
        # Use integers: the complement of an IntFlag loses the bits that have no name.
        wanted = _u64(message)
        unknown = wanted & ~int(self._offered_protocol_features)
        if unknown:
            raise Refused(f"protocol feature bits {unknown:#x} were not offered")
        accepted = ProtocolFeature(wanted)
        if ProtocolFeature.INBAND_NOTIFICATIONS in accepted and INBAND_NEEDS not in accepted:
            raise Refused("INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK too")
        self._protocol_features = accepted

    @property
    def _offered_protocol_features(self) -> ProtocolFeature:
        offered = PROTOCOL_FEATURES
        if not self._disk.offers("status"):
            offered &= ~ProtocolFeature.STATUS
        if self._disk.offers("inband-notifications"):
            offered |= ProtocolFeature.INBAND_NOTIFICATIONS
        return offered

    async def _on_get_queue_num(self, message: Message) -> Payload:
        return U64(len(self._vrings))

    async def _on_set_owner(self, message: Message) -> None:
        """Nothing to do: a connection has one owner, the one at its other end."""

    async def _on_reset_owner(self, message: Message) -> None:
        """Deprecated; the specification advises to disable all rings or to ignore it."""
        await self._disable_all()

    async def _on_reset_device(self, message: Message) -> None:
        # Like after GET_VRING_BASE, nothing of the old rings is left, not even in the in-flight area.
        await asyncio.gather(*(self._end_ring(vring) for vring in self._vrings))
        await asyncio.gather(*(self._forget(vring) for vring in self._vrings))
        self._write_back = True

    async def _on_set_backend_req_fd(self, message: Message) -> None:
        """User-mode Linux always sends it, even if nothing is ever sent there."""
        (fd,) = message.take_fds()
        self._close_channel()
        self._channel = BackendChannel(fd)

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # Device status (virtio 1.2, section 2.1).

    async def _on_set_status(self, message: Message) -> None:
        """0 is a reset: QEMU sends it whenever it stops the device, also when the guest is only paused.

        QEMU does not send everything again, so memory, notifiers, and whether the driver flushes are kept.
        """
        status = _u64(message)
        if status & ~STATUS_MASK:
            raise Refused(f"{status:#x} is not a device status, which has 8 bits")
        if status == 0:
            for vring in self._vrings:
                vring.enabled = False
            await asyncio.gather(*(self._end_ring(vring) for vring in self._vrings))
        # Section 3.1.1: a driver that reads it back without FEATURES_OK knows that its features were rejected.
        self._status = status & ~(FEATURES_OK if self._features_refused else 0)

    async def _on_get_status(self, message: Message) -> Payload:
        broken = any(vring.queue.broken for vring in self._vrings)
        return U64(self._status | (DEVICE_NEEDS_RESET if broken else 0))

    # Configuration space.

    async def _on_get_config(self, message: Message) -> Payload:
        asked = _expect(message, Config)
        if asked.offset + asked.size > MAX_CONFIG_SIZE:
            raise Refused(f"{asked.size} bytes at offset {asked.offset} are beyond the configuration space")
        space = bytearray(self._disk.config_space().ljust(MAX_CONFIG_SIZE, b"\0"))
        space[WRITEBACK] = self._write_back
        return Config(asked.offset, asked.size, 0, bytes(space[asked.offset : asked.offset + asked.size]))

    async def _on_set_config(self, message: Message) -> None:
        """Only one field can be written: whether the driver flushes (section 5.2.5.2)."""
        asked = _expect(message, Config)
        if (asked.offset, asked.size) != (WRITEBACK, 1) or asked.payload not in (b"\0", b"\1"):
            raise Refused(f"only `writeback` of the configuration space can be written, the byte at {WRITEBACK}")
        if not self._features & VIRTIO_BLK_F_CONFIG_WCE:
            raise Refused("`writeback` is written although the driver did not accept CONFIG_WCE")
        await self._set_write_back(asked.payload == b"\1")

    async def _set_write_back(self, write_back: bool) -> None:
        """Set whether the driver flushes. If it does not, all completed requests must be stable, earlier ones too."""
        if write_back == self._write_back:
            return
        running = await self._stop_all()
        try:
            if not write_back:
                await asyncio.to_thread(self._disk.sync)
            self._write_back = write_back
        finally:
            for vring in running:
                await self._start_or_stop(vring)

    # Memory.

    async def _on_set_mem_table(self, message: Message) -> None:
        described = _expect(message, messages.MemoryTable).regions
        regions = [self._map(region, fd) for region, fd in zip(described, message.fds, strict=True)]
        await self._set_memory(MemoryTable(regions))

    async def _on_get_max_mem_slots(self, message: Message) -> Payload:
        return U64(MAX_MEMORY_SLOTS)

    async def _on_add_mem_reg(self, message: Message) -> None:
        if len(self._memory.regions) >= MAX_MEMORY_SLOTS:
            raise Refused(f"all {MAX_MEMORY_SLOTS} memory slots are in use")
        region = self._map(_expect(message, SingleMemoryRegion).region, message.fds[0])
        await self._set_memory(self._memory.adding(region))

    async def _on_rem_mem_reg(self, message: Message) -> None:
        region = _expect(message, SingleMemoryRegion).region
        await self._set_memory(self._memory.removing(region.guest_address, region.user_address, region.size))

    def _map(self, region: MemoryRegion, fd: int) -> Region:
        where = (region.guest_address, region.user_address, region.size, region.mmap_offset)
        return Region.map(*where, fd, self._alarm, self._quota)

    def _map_log(self, fd: int, size: int, offset: int) -> DirtyLog:
        return DirtyLog(Mapping(fd, size, offset, self._alarm, self._quota))

    def _map_inflight(self, described: Inflight, fd: int) -> InflightArea:
        return InflightArea(described, fd, self._alarm, self._quota)

    async def _set_memory(self, memory: MemoryTable) -> None:
        self._memory = memory
        running = [vring for vring in self._vrings if vring.running]
        await asyncio.gather(*(self._done(vring.worker.set_memory(vring.queue, memory)) for vring in running))

    # Migration.

    async def _on_set_log_base(self, message: Message) -> Payload:
        """Set the dirty log. SET_FEATURES starts its use; later a larger log may replace it while rings run."""
        described = _expect(message, LogRegion)
        if described.size == 0 or described.size + described.offset >= 1 << 62:
            raise Refused(f"impossible dirty log: {described.size} bytes at {described.offset}")
        self._log = self._map_log(message.fds[0], described.size, described.offset)
        for vring in self._vrings:
            if vring.running and self._uses_changed(vring):
                await self._stop(vring)
                await self._start_or_stop(vring)
        return U64(0)

    async def _on_set_log_fd(self, message: Message) -> None:
        """An eventfd to announce changes of the log; the front end can read ours at any time."""

    @property
    def _logs(self) -> bool:
        return bool(self._features & VHOST_F_LOG_ALL)

    # In-flight I/O, which must survive a crash of this process.

    async def _on_get_inflight_fd(self, message: Message) -> Payload:
        asked = _expect(message, Inflight)
        described, fd = inflight_area.create(asked.num_queues, asked.queue_size)
        self._reply_fds = [fd]
        return described

    async def _on_set_inflight_fd(self, message: Message) -> None:
        """A running ring uses it from its next start."""
        self._inflight = self._map_inflight(_expect(message, Inflight), message.fds[0])

    # Rings.

    async def _on_set_vring_num(self, message: Message) -> None:
        state = _expect(message, VringState)
        vring = self._vring(state.index)
        size = state.num
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise Refused(f"ring size {size} is not from 1 to {MAX_QUEUE_SIZE}")
        if size & (size - 1) and not self._packed:
            raise Refused(f"ring size {size} is not a power of two")
        if vring.running and size != vring.size:
            raise Refused("the ring is running")
        vring.size = size
        await self._start_or_stop(vring)

    async def _on_set_vring_addr(self, message: Message) -> None:
        address = _expect(message, VringAddr)
        vring = self._vring(address.index)
        for name, value, alignment in (
            ("descriptor", address.descriptor, 16),
            ("available", address.available, 2),
            ("used", address.used, 4),
        ):
            if value % alignment:
                raise Refused(f"the {name} address {value:#x} is not aligned to {alignment} bytes")
        if vring.running and vring.address is not None and not _same_places(address, vring.address):
            raise Refused("the ring is running")
        vring.address = address
        await self._start_or_stop(vring)

    async def _on_set_vring_base(self, message: Message) -> None:
        state = _expect(message, VringState)
        vring = self._vring(state.index)
        if vring.running:
            raise Refused("the ring is running")
        vring.base = state.num if self._packed else state.num & 0xFFFF

    async def _on_get_vring_base(self, message: Message) -> Payload:
        vring = self._vring(_expect(message, VringState).index)
        await self._end_ring(vring)
        return VringState(vring.queue.number, vring.base)

    async def _end_ring(self, vring: Vring) -> None:
        """Stop it for good: the next driver describes the ring again before it starts it."""
        await self._reset(vring)
        if self._inflight is not None:
            self._inflight.forget(vring.queue.number)
        vring.address = None
        vring.kick_fd = replace_fd(vring.kick_fd, -1)

    async def _on_set_vring_enable(self, message: Message) -> None:
        state = _expect(message, VringState)
        vring = self._vring(state.index)
        vring.enabled = bool(state.num)
        await self._start_or_stop(vring)

    async def _on_set_vring_kick(self, message: Message) -> None:
        described = _expect(message, VringFd)
        vring = self._vring(described.index)
        if described.no_fd and not self._in_band:
            raise Refused("rings without a kick fd, which would have to be polled, are not supported")
        await self._stop(vring)
        if described.no_fd:
            vring.kick_fd = replace_fd(vring.kick_fd, -1)
            return
        (fd,) = message.take_fds()
        vring.kick_fd = replace_fd(vring.kick_fd, fd)
        await self._start_or_stop(vring)

    async def _on_vring_kick(self, message: Message) -> None:
        """A kick in band: the first one starts the ring. The data plane is still kicked through an eventfd."""
        vring = self._vring(_expect(message, VringState).index)
        if vring.kick_fd < 0:
            vring.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        await self._start_or_stop(vring)
        await self._done(vring.worker.signal(vring.kick_fd))

    async def _on_set_vring_call(self, message: Message) -> None:
        vring = self._vring(_expect(message, VringFd).index)
        fd, vring.call_told = _only_fd(message), True
        try:
            await self._done(vring.worker.set_call_fd(vring.queue, fd))
        finally:
            vring.call_fd = replace_fd(vring.call_fd, fd)
        self._end_signal(vring, BackendRequest.VRING_CALL)
        # Requests that completed before this fd was known are announced now; QEMU's own tests rely on it.
        if vring.call_fd >= 0:
            await self._done(vring.worker.signal(vring.call_fd))

    async def _on_set_vring_err(self, message: Message) -> None:
        vring = self._vring(_expect(message, VringFd).index)
        fd = _only_fd(message)
        try:
            await self._set_err_fd(vring, fd)
        finally:
            vring.err_fd = replace_fd(vring.err_fd, fd)
        self._end_signal(vring, BackendRequest.VRING_ERR)

    async def _set_err_fd(self, vring: Vring, fd: int) -> None:
        await self._done(vring.worker.call(lambda: setattr(vring.queue, "err_fd", fd)))

    @property
    def _in_band(self) -> bool:
        return ProtocolFeature.INBAND_NOTIFICATIONS in self._protocol_features

    async def _signal_in_band(self, vring: Vring) -> None:
        """Notify the front end by messages if it has not sent an fd."""
        if not self._in_band:
            return
        if not vring.call_told and BackendRequest.VRING_CALL not in vring.signals:
            await self._done(
                vring.worker.set_call_fd(vring.queue, self._begin_signal(vring, BackendRequest.VRING_CALL))
            )
        if vring.err_fd < 0 and BackendRequest.VRING_ERR not in vring.signals:
            await self._set_err_fd(vring, self._begin_signal(vring, BackendRequest.VRING_ERR))

    def _begin_signal(self, vring: Vring, request: BackendRequest) -> int:
        signal = vring.signals[request] = InbandSignal(self._ask_front_end, request, vring.queue.number, self._logger)
        return signal.fd

    async def _ask_front_end(self, request: BackendRequest, payload: Payload) -> None:
        if self._channel is None:
            raise ConnectionError("the front end has not sent SET_BACKEND_REQ_FD")
        await self._channel.ask(request, payload)

    def _end_signal(self, vring: Vring, request: BackendRequest) -> None:
        """Close its fd, which the worker no longer uses."""
        signal = vring.signals.pop(request, None)
        if signal is not None:
            signal.close()

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise Refused(f"queue {index} does not exist; there are {len(self._vrings)}")
        return self._vrings[index]

    async def _start_or_stop(self, vring: Vring) -> None:
        """Bring the ring into the state that the messages require; a broken one stays stopped until a reset."""
        if not vring.enabled:
            await self._stop(vring)
        elif vring.running or vring.queue.broken:
            return
        elif vring.kick_fd >= 0 and vring.size and vring.address is not None:
            layout = self._layout(vring.queue.number, vring.size, vring.base, vring.address)
            await self._signal_in_band(vring)
            await self._done(vring.worker.start_queue(vring.queue, layout, self._memory, vring.kick_fd))
            vring.running = True

    def _uses_changed(self, vring: Vring) -> bool:
        """Whether the new features change the use of a running ring."""
        layout = vring.queue.layout
        if layout is None or vring.address is None:
            return False
        return self._layout(vring.queue.number, layout.size, layout.base, vring.address) != layout

    def _layout(self, number: int, size: int, base: int, address: VringAddr) -> RingLayout:
        area = self._inflight
        return RingLayout(
            size=size,
            desc=address.descriptor,
            avail=address.available,
            used=address.used,
            base=base,
            features=self._features,
            write_through=self._write_through,
            log=self._log if self._logs else None,
            inflight=area.region(number, size, packed=self._packed) if area is not None else None,
        )

    @property
    def _packed(self) -> bool:
        return bool(self._features & VIRTIO_F_RING_PACKED)

    @property
    def _write_through(self) -> bool:
        """Whether writes must be stable when they complete: the driver cannot flush, or has announced not to flush."""
        # Sections 5.2.5.2 and 5.2.6.2
        chosen = bool(self._features & VIRTIO_BLK_F_CONFIG_WCE) and not self._write_back
        return chosen or not self._features & VIRTIO_BLK_F_FLUSH

    async def _stop(self, vring: Vring) -> None:
        """Stop fetching and wait until all fetched requests have completed."""
        if vring.running:
            drained = vring.worker.stop_queue(vring.queue)
            try:
                await asyncio.wait_for(self._done(drained), TELL_AFTER)
            except TimeoutError:
                self._logger.warning(
                    "queue %d: waiting for %d requests in flight", vring.queue.number, vring.queue.in_flight
                )
                await self._done(drained)
            vring.running = False
            vring.base = vring.queue.base

    async def _reset(self, vring: Vring) -> None:
        """Stop the ring and clear its error, if it was broken."""
        await self._stop(vring)
        vring.queue.record["broken"] = 0

    async def _disable_all(self) -> None:
        for vring in self._vrings:
            vring.enabled = False
            await self._stop(vring)

    async def _forget(self, vring: Vring) -> None:
        """Stop the ring and release all resources that the front end has sent for it."""
        try:
            await self._reset(vring)
            if vring.queue.record["call_fd"] >= 0:
                await self._done(vring.worker.set_call_fd(vring.queue, -1))
        finally:
            # Also if the worker has ended: nobody uses them any longer.
            vring.kick_fd = replace_fd(vring.kick_fd, -1)
            vring.call_fd = replace_fd(vring.call_fd, -1)
            vring.err_fd = replace_fd(vring.err_fd, -1)
            vring.queue.err_fd = -1
            for request in list(vring.signals):
                self._end_signal(vring, request)
            vring.call_told = False
            vring.size, vring.base, vring.address, vring.enabled = 0, 0, None, False

    async def _done(self, future: Future[Result]) -> Result:
        """Wait for an operation of a worker, which completes it even when nobody waits any more.

        A front end must not be able to block the worker with a full notifier (signaller.py). Whether one blocks it
        cannot be seen, only whether one could.
        """
        waiting = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait([waiting], timeout=LOOK_AFTER))[0]:
                for vring in self._vrings:
                    if vring.has_full_notifier():
                        vring.worker.interrupt()
            return waiting.result()
        finally:
            # See `_perform` of worker.py.
            del future, waiting


def _expect(message: Message, kind: type[Result]) -> Result:
    assert isinstance(message.payload, kind), "the rules of the connection fix each message's payload"
    return message.payload


def _u64(message: Message) -> int:
    return _expect(message, U64).value


def _only_fd(message: Message) -> int:
    """The fd that came with the message, non-blocking, or -1.

    A front end must not be able to block our thread with a full eventfd, pipe or socket (user-mode Linux's).
    O_NONBLOCK belongs to the file, so the front end could clear it again: signaller.py handles that.
    """
    for fd in message.fds:
        os.set_blocking(fd, False)
    return next(iter(message.take_fds()), -1)


@contextlib.contextmanager
def _refusing(why: str) -> Iterator[None]:
    """Turn a TimeoutError inside into a Refused."""
    try:
        yield
    except TimeoutError:
        raise Refused(why) from None


def _shared(mapping: Mapping) -> SharedMemory:
    return SharedMemory(Fd(mapping.fd), mapping.offset, mapping.size)


def _same_places(a: VringAddr, b: VringAddr) -> bool:
    return (a.descriptor, a.used, a.available) == (b.descriptor, b.used, b.available)
