"""What each request of a front end does to the device: one function per message."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import Quota
from ringplane.inflight.area import create_area
from ringplane.log.logs import DiskLog
from ringplane.session.config_space import ConfigSpace
from ringplane.session.fds import check_fds, take_notifier
from ringplane.session.front_end_memory import MAX_MEMORY_SLOTS, FrontEndMemory
from ringplane.session.inband import BackendChannel
from ringplane.session.negotiation import DEVICE_NEEDS_RESET, STATUS_MASK, Negotiation
from ringplane.session.refusal import Refused
from ringplane.session.vring import RingUse
from ringplane.session.vrings import Vrings
from ringplane.system.aside import aside
from ringplane.vhost_user import payloads
from ringplane.vhost_user.connection import Message, rule_of
from ringplane.vhost_user.messages import BackendRequest, Request
from ringplane.vhost_user.payloads import (
    U64,
    Config,
    Inflight,
    LogRegion,
    Payload,
    SingleMemoryRegion,
    VringAddr,
    VringFd,
    VringState,
)

AnyPayload = TypeVar("AnyPayload", bound=Payload)


@dataclass(frozen=True, slots=True)
class Reply:
    """`fds` go with it, and are closed when it has been sent."""

    payload: Payload
    fds: list[int] = field(default_factory=list)


class Handlers:
    """The device as one front end has set it up so far."""

    def __init__(self, disk: Disk, quota: Quota, logger: DiskLog) -> None:
        self._disk = disk
        self._logger = logger
        self.negotiation = Negotiation(disk)
        self.config = ConfigSpace(disk)
        self.memory = FrontEndMemory(quota)
        self.vrings = Vrings(disk, logger)
        self.channel: BackendChannel | None = None

    async def handle(self, message: Message) -> Reply | None:
        """Act on a request; None: it has no reply of its own.

        Raises Refused, BadMemory, BadFd, OSError and WorkerEnded if it cannot be carried out.
        """
        handler: Callable[..., Awaitable[Payload | Reply | None]] | None = None
        if isinstance(message.request, Request):
            handler = getattr(self, f"_on_{message.request.name.lower()}", None)
        feature = rule_of(message.request).feature
        if handler is None:
            raise Refused("not supported by this back end")
        if feature is not None and feature not in self.negotiation.protocol_features:
            raise Refused(f"sent although the protocol feature {feature.name} was not negotiated")
        check_fds(message)
        async with self._cache_emptied():
            reply = await handler(message)
        return reply if reply is None or isinstance(reply, Reply) else Reply(reply)

    @property
    def use(self) -> RingUse:
        """How rings that are started now are used."""
        negotiation, memory = self.negotiation, self.memory
        return RingUse(
            features=negotiation.features,
            write_through=self.config.write_through(negotiation.features),
            memory=memory.table,
            log=memory.log if negotiation.logs else None,
            inflight=memory.inflight,
            ask=self._ask_front_end if negotiation.in_band else None,
            paused=self._disk.paused,
        )

    async def close(self) -> list[BaseException]:
        """Stop all rings and release all resources; returns the errors of rings."""
        async with self._cache_emptied():
            errors = await self.vrings.forget_all()
            self.memory.close()
            self._close_channel()
        return errors

    @contextlib.asynccontextmanager
    async def _cache_emptied(self) -> AsyncIterator[None]:
        """At the end of this `async with`, if no ring runs any more: now another process may use the image.

        There is no negative reply to GET_VRING_BASE, and without a reply the guest would leave all the same.
        """
        ran = self.vrings.served
        try:
            yield
        finally:
            if ran and not self.vrings.served:
                await self._empty_cache()

    async def _empty_cache(self) -> None:
        try:
            await self._disk.empty_cache()
        except OSError as error:
            self._logger.error(
                "completed writes may be lost if the image is used elsewhere now: %s", error.strerror or error
            )

    # Negotiation.

    async def _on_get_features(self, message: Message) -> Payload:
        return U64(self.negotiation.offered)

    async def _on_set_features(self, message: Message) -> None:
        self.negotiation.set_features(_u64(message))
        if self.negotiation.rings_start_enabled:
            for vring in self.vrings:
                vring.enabled = True
        self._warn_of_small_log()
        await self.vrings.stop_changed(self.use)
        await self.vrings.adjust(self.vrings, self.use)

    async def _on_get_protocol_features(self, message: Message) -> Payload:
        return U64(int(self.negotiation.offered_protocol))

    async def _on_set_protocol_features(self, message: Message) -> None:
        self.negotiation.set_protocol_features(_u64(message))

    async def _on_get_queue_num(self, message: Message) -> Payload:
        return U64(len(self.vrings))

    async def _on_set_owner(self, message: Message) -> None:
        """Nothing to do: a connection has one owner, the one at its other end."""

    async def _on_reset_owner(self, message: Message) -> None:
        """Deprecated; the specification advises to disable all rings or to ignore it."""
        await self.vrings.disable_all()

    async def _on_reset_device(self, message: Message) -> None:
        # Like after GET_VRING_BASE, nothing of the old rings is left, not even in the in-flight area.
        await self.vrings.end_all(self.memory.inflight)
        errors = await self.vrings.forget_all()
        if errors:
            raise errors[0]
        self.config.write_back = True

    # The back-end channel.

    async def _on_set_backend_req_fd(self, message: Message) -> None:
        """User-mode Linux always sends it, even if nothing is ever sent there."""
        (fd,) = message.take_fds()
        self._close_channel()
        self.channel = BackendChannel(fd)

    def _close_channel(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    async def _ask_front_end(self, request: BackendRequest, payload: Payload) -> None:
        if self.channel is None:
            raise ConnectionError("the front end has not sent SET_BACKEND_REQ_FD")
        await self.channel.ask(request, payload)

    # Device status (virtio 1.2, section 2.1).

    async def _on_set_status(self, message: Message) -> None:
        """0 is a reset: QEMU sends it whenever it stops the device, also when the guest is only paused.

        QEMU does not send everything again, so memory, notifiers, and whether the driver flushes are kept.
        """
        status = _u64(message)
        if status & ~STATUS_MASK:
            raise Refused(f"{status:#x} is not a device status, which has 8 bits")
        if status == 0:
            for vring in self.vrings:
                vring.enabled = False
            await self.vrings.end_all(self.memory.inflight)
        self.negotiation.set_status(status)

    async def _on_get_status(self, message: Message) -> Payload:
        broken = any(vring.queue.state.broken for vring in self.vrings)
        return U64(self.negotiation.status | (DEVICE_NEEDS_RESET if broken else 0))

    # Configuration space.

    async def _on_get_config(self, message: Message) -> Payload:
        return self.config.read(_expect(message, Config))

    async def _on_set_config(self, message: Message) -> None:
        """Set whether the driver flushes. If it does not, all completed requests must be stable, earlier ones too."""
        write_back = self.config.check_write(_expect(message, Config), self.negotiation.features)
        if write_back == self.config.write_back:
            return
        running = await self.vrings.stop_all()
        try:
            if not write_back:
                await aside(self._disk.sync)
            self.config.write_back = write_back
        finally:
            await self.vrings.start_again(running, self.use)

    # Memory.

    async def _on_set_mem_table(self, message: Message) -> None:
        self.memory.set_table(_expect(message, payloads.MemoryTable).regions, message.fds)
        self._warn_of_small_log()
        await self.vrings.set_memory(self.use)

    async def _on_get_max_mem_slots(self, message: Message) -> Payload:
        return U64(MAX_MEMORY_SLOTS)

    async def _on_add_mem_reg(self, message: Message) -> None:
        self.memory.add_region(_expect(message, SingleMemoryRegion).region, message.fds[0])
        self._warn_of_small_log()
        await self.vrings.set_memory(self.use)

    async def _on_rem_mem_reg(self, message: Message) -> None:
        self.memory.remove_region(_expect(message, SingleMemoryRegion).region)
        await self.vrings.set_memory(self.use)

    # Migration.

    async def _on_set_log_base(self, message: Message) -> Payload:
        """Set the dirty log. SET_FEATURES starts its use; later a larger log may replace it while rings run."""
        self.memory.set_log(_expect(message, LogRegion), message.fds[0])
        self._warn_of_small_log()
        await self.vrings.adjust(await self.vrings.stop_changed(self.use), self.use)
        return U64(0)

    def _warn_of_small_log(self) -> None:
        """The front end has to make the log large enough; without a warning its mistake is seen in the guest only."""
        memory = self.memory
        if self.negotiation.logs and memory.log is not None and memory.log.mapping.size < memory.log_size_needed:
            self._logger.warning(
                "the dirty log of %d bytes is smaller than the %d bytes that the shared memory needs: the migration "
                "loses what is written to the memory beyond it",
                *(memory.log.mapping.size, memory.log_size_needed),
            )

    async def _on_set_log_fd(self, message: Message) -> None:
        """An eventfd to announce changes of the log; the front end can read ours at any time."""

    # In-flight I/O, which must survive a crash of this process.

    async def _on_get_inflight_fd(self, message: Message) -> Reply:
        asked = _expect(message, Inflight)
        sizes, fd = create_area(asked.num_queues, asked.queue_size)
        return Reply(Inflight(*sizes), [fd])

    async def _on_set_inflight_fd(self, message: Message) -> None:
        """A running ring uses it from its next start."""
        self.memory.set_inflight(_expect(message, Inflight), message.fds[0])

    # Rings.

    async def _on_set_vring_num(self, message: Message) -> None:
        state = _expect(message, VringState)
        vring = self.vrings[state.index]
        vring.set_size(state.num, packed=self.negotiation.packed)
        await vring.adjust(self.use)

    async def _on_set_vring_addr(self, message: Message) -> None:
        address = _expect(message, VringAddr)
        vring = self.vrings[address.index]
        vring.set_address(address)
        await vring.adjust(self.use)

    async def _on_set_vring_base(self, message: Message) -> None:
        state = _expect(message, VringState)
        self.vrings[state.index].set_base(state.num, packed=self.negotiation.packed)

    async def _on_get_vring_base(self, message: Message) -> Payload:
        index = _expect(message, VringState).index
        return VringState(index, await self.vrings[index].end(self.memory.inflight))

    async def _on_set_vring_enable(self, message: Message) -> None:
        state = _expect(message, VringState)
        vring = self.vrings[state.index]
        vring.enabled = bool(state.num)
        await vring.adjust(self.use)

    async def _on_set_vring_kick(self, message: Message) -> None:
        described = _expect(message, VringFd)
        vring = self.vrings[described.index]
        if described.no_fd and not self.negotiation.in_band:
            raise Refused("rings without a kick fd, which would have to be polled, are not supported")
        await vring.stop()
        vring.set_kick(next(iter(message.take_fds()), -1))
        await vring.adjust(self.use)

    async def _on_vring_kick(self, message: Message) -> None:
        await self.vrings[_expect(message, VringState).index].kick(self.use)

    async def _on_set_vring_call(self, message: Message) -> None:
        await self.vrings[_expect(message, VringFd).index].set_call(take_notifier(message))

    async def _on_set_vring_err(self, message: Message) -> None:
        await self.vrings[_expect(message, VringFd).index].set_err(take_notifier(message))


def _expect(message: Message, kind: type[AnyPayload]) -> AnyPayload:
    assert isinstance(message.payload, kind), "the rules of the connection fix each message's payload"
    return message.payload


def _u64(message: Message) -> int:
    return _expect(message, U64).value
