"""One vhost-user connection, from a front end's connection to its end: the loop over its messages, and pauses.

What the messages do is in handlers.py. Source: QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator

from ringplane.dataplane.worker import WorkerEnded
from ringplane.device.disk import Disk
from ringplane.guest_memory.address_space import BadMemory, Quota
from ringplane.log.logs import DiskLog
from ringplane.session.fds import BadFd
from ringplane.session.handlers import Handlers, Reply
from ringplane.session.inband import BackendChannel
from ringplane.session.refusal import NEGATIVE_REPLIES, Refused, refusing_timeouts
from ringplane.session.snapshot import SessionSnapshot
from ringplane.system.fd import Fd
from ringplane.vhost_user.connection import Message, UnknownRequest, rule_of
from ringplane.vhost_user.messages import BackendRequest, ProtocolError, ProtocolFeature
from ringplane.vhost_user.payloads import U64
from ringplane.vhost_user.peers import gone
from ringplane.vhost_user.transport import AsyncTransport, Interrupted

log = logging.getLogger(__name__)

# Seconds that a front end has to read a message that is being sent, before it is handed over.
FREEZE_PATIENCE = 1.0


class Session:
    """One front end, from its connection to its end."""

    def __init__(self, transport: AsyncTransport, disk: Disk, quota: Quota) -> None:
        self._transport = transport
        self._logger = DiskLog(log, disk.name)
        self._handlers = Handlers(disk, quota, self._logger)
        self._busy = asyncio.Lock()
        # For `freeze`: `_paused` is set while no message is taken; the next one is taken when `_go` is set.
        self._paused, self._go = asyncio.Event(), asyncio.Event()
        self._go.set()
        self._held = contextlib.AsyncExitStack()
        self._disk = disk
        self._giving_up: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve the front end until it disconnects or breaks the protocol; then free all its resources."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._handlers.memory.alarm_fd, self._end_without_memory)
        try:
            # A front end that was taken over has rings to start.
            await self._start_again()
            while await self._serve_one_message():
                pass
        except (ProtocolError, Refused) as error:
            self._logger.warning("front end dropped: %s", error)
        except OSError as error:
            self._logger.info("front end lost: %s", error)
        finally:
            loop.remove_reader(self._handlers.memory.alarm_fd)
            await self._close()
            self._paused.set()

    def _end_without_memory(self) -> None:
        """Stop: requests may have been executed with zeros in place of their data, so this device cannot continue."""
        asyncio.get_running_loop().remove_reader(self._handlers.memory.alarm_fd)
        self._logger.warning("front end dropped: it truncated memory that it shares with this disk (ftruncate(2))")
        self._transport.close()

    async def drain(self, then: Callable[[bool], Awaitable[None]], patience: float | None = None) -> None:
        """Fetch nothing, complete all fetched requests, do what `then` does, and continue.

        After `patience` seconds `then` is called whatever is in flight; it gets whether all have completed. Raises
        Refused if a message of the front end is not handled in that time.
        """
        async with contextlib.AsyncExitStack() as held:
            with refusing_timeouts(f"a message of the front end has waited for requests for {patience or 0:g} seconds"):
                async with asyncio.timeout(patience):
                    await held.enter_async_context(self._busy)
            await then(await held.enter_async_context(self._stopped(patience)))

    async def pause(self) -> None:
        """Complete all fetched requests; the disk is paused, so that no ring starts until `resume`."""
        async with self._busy:
            await self._handlers.vrings.stop_all()

    async def resume(self) -> None:
        """Start the rings, because the disk is not paused any more."""
        async with self._busy:
            await self._start_again()

    async def _start_again(self) -> None:
        await self._handlers.vrings.start_again(self._handlers.vrings, self._handlers.use)

    def _stopped(self, patience: float | None) -> contextlib.AbstractAsyncContextManager[bool]:
        """See Vrings.stopped."""
        return self._handlers.vrings.stopped(patience, lambda: self._handlers.use)

    async def notify_config_change(self) -> None:
        """Notify the front end, if it has a back-end channel, that the configuration space has changed."""
        channel = self._handlers.channel
        if channel is None or not self._has(ProtocolFeature.CONFIG):
            self._logger.info("the front end cannot be notified; the driver sees the new size when it starts again")
            return
        try:
            await channel.notify(BackendRequest.CONFIG_CHANGE_MSG)
        except OSError as error:
            self._logger.warning("the front end could not be notified of the new size: %s", error or "it does not read")

    async def _close(self) -> None:
        self._transport.close()
        # An operation that has begun may wait for requests too.
        self.give_up()
        async with self._busy:
            for error in await self._handlers.close():
                self._logger.error("a queue could not be stopped: %s", error)
        if self._giving_up is not None:
            self._giving_up.cancel()

    def give_up(self) -> None:
        """Nobody waits for requests any more: rings that stop do not wait for those that layers keep."""
        if self._giving_up is None and self._disk.layers:
            self._giving_up = asyncio.create_task(self._handlers.vrings.abandon_kept())

    @contextlib.contextmanager
    def _noticing_its_end(self) -> Iterator[None]:
        """A message that stops rings may wait for ever for what a layer keeps, but not without its front end."""
        watching = asyncio.create_task(self._give_up_when_gone()) if self._disk.layers else None
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()

    async def _give_up_when_gone(self) -> None:
        await gone(self._transport)
        self.give_up()

    # Messages.

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
                with self._noticing_its_end():
                    reply = await self._answer(message)
            # Without the lock: a front end that does not read its replies must hold up only itself.
            if reply is not None:
                await self._reply(message, reply)
        return True

    async def _answer(self, message: Message) -> Reply | None:
        try:
            reply = await self._handlers.handle(message)
        except (Refused, BadMemory, BadFd, OSError, WorkerEnded) as error:
            return self._refuse(message, Refused(f"{message.name}: {error}"))
        return Reply(U64(0)) if reply is None and self._wants_ack(message) else reply

    def _wants_ack(self, message: Message) -> bool:
        return message.need_reply and self._has(ProtocolFeature.REPLY_ACK)

    def _has(self, feature: ProtocolFeature) -> bool:
        return feature in self._handlers.negotiation.protocol_features

    async def _reply(self, message: Message, reply: Reply) -> None:
        try:
            data = self._transport.connection.reply(message, reply.payload, reply.fds)
            await self._transport.send(data, reply.fds)
        finally:
            for fd in reply.fds:
                os.close(fd)

    def _refuse(self, message: Message, why: Refused) -> Reply:
        """Send a negative reply, or, if there is none, end the connection: its view of our state would be wrong."""
        if message.request in NEGATIVE_REPLIES:
            self._logger.warning("%s", why)
            return Reply(NEGATIVE_REPLIES[message.request])
        if self._wants_ack(message) and rule_of(message.request).reply is None:
            self._logger.warning("%s", why)
            return Reply(U64(1))
        try:
            raise why
        finally:
            # If a frame of its own traceback refers to it, the exception, and with it this front end's memory, stays
            # until the next garbage collection.
            del why

    # Handing over to another process, and taking over from one.

    async def freeze(self, patience: float) -> None:
        """Stop all activity until `thaw`: no message is taken, no ring runs, and all fetched requests are completed.

        Raises Refused if the front end does not read, has removed a ring's memory, or requests in flight take longer
        than `patience` seconds; everything continues then.
        """
        async with contextlib.AsyncExitStack() as held:
            self._go.clear()
            held.callback(self._go.set)
            self._transport.interrupt()
            with refusing_timeouts("the front end does not read its replies"):
                async with asyncio.timeout(FREEZE_PATIENCE):
                    await self._paused.wait()
                    await held.enter_async_context(self._busy)
            if any(vring.enabled and vring.queue.state.suspended for vring in self._handlers.vrings):
                raise Refused("the front end has removed the memory of a ring and has not added it again yet")
            if not await held.enter_async_context(self._stopped(patience)):
                raise Refused(f"requests in flight took longer than {patience:g} seconds")
            with refusing_timeouts("the front end does not read the back-end channel"):
                async with asyncio.timeout(FREEZE_PATIENCE):
                    await self._quieten(held)
            self._held = held.pop_all()

    async def _quieten(self, held: contextlib.AsyncExitStack) -> None:
        """Wait until nothing is under way on the channel to the front end."""
        await self._handlers.vrings.forwarded()
        if self._handlers.channel is not None:
            await held.enter_async_context(self._handlers.channel.quiet)

    async def thaw(self) -> None:
        """Continue after `freeze`."""
        await self._held.aclose()

    async def abandon(self) -> None:
        """End after `freeze`, because another process resumes this front end: nothing is sent and nothing is read."""
        self._transport.close()
        for vring in self._handlers.vrings:
            vring.enabled = False
        await self._held.aclose()

    async def _pause(self) -> None:
        self._paused.set()
        await self._go.wait()
        self._paused.clear()

    def snapshot(self) -> SessionSnapshot:
        """The state that another process needs to resume; after `freeze`."""
        unfinished, fds = self._transport.connection.unfinished
        handlers, negotiation = self._handlers, self._handlers.negotiation
        return SessionSnapshot(
            socket=Fd(self._transport.fileno()),
            unfinished=unfinished,
            unfinished_fds=[Fd(fd) for fd in fds],
            features=negotiation.features,
            features_refused=negotiation.features_refused,
            protocol_features=int(negotiation.protocol_features),
            status=negotiation.status,
            write_back=handlers.config.write_back,
            memory=handlers.memory.snapshot(),
            channel=Fd.of(handlers.channel.fileno()) if handlers.channel is not None else None,
            vrings=[vring.snapshot() for vring in handlers.vrings],
        )

    def resume_from(self, saved: SessionSnapshot) -> None:
        """Take over a front end from another process, before `run`, which starts its rings.

        Raises Refused, BadMemory, OSError and ProtocolError if the state does not fit this disk.
        """
        handlers, negotiation = self._handlers, self._handlers.negotiation
        negotiation.resume(saved.features, saved.protocol_features)
        if len(saved.vrings) != len(handlers.vrings):
            raise Refused(f"the front end has {len(saved.vrings)} rings and this disk {len(handlers.vrings)} queues")
        self._transport.connection.receive_again(saved.unfinished, [os.dup(fd.number) for fd in saved.unfinished_fds])
        negotiation.status, negotiation.features_refused = saved.status, saved.features_refused
        handlers.config.write_back = saved.write_back
        handlers.memory.resume_from(saved.memory)
        if saved.channel is not None:
            handlers.channel = BackendChannel(os.dup(saved.channel.number))
        for vring, each in zip(handlers.vrings, saved.vrings, strict=True):
            vring.resume_from(each)
