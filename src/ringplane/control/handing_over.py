"""The running process of a planned restart (handover.py): it offers its disks, freezes them, and lets go of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ringplane.block.image import ImageError
from ringplane.control.export import Export
from ringplane.control.handed_counters import saved_counters, thread_counters
from ringplane.control.handed_policies import saved_policies
from ringplane.control.handover import READY_PATIENCE, TAKING_PATIENCE, VERSION, Channel, HandoverError, options_of
from ringplane.control.listener import Listener
from ringplane.control.planned import place
from ringplane.control.present_changes import changes_of_served
from ringplane.control.server import Server
from ringplane.system.aside import aside
from ringplane.system.fd import Fd
from ringplane.system.notes import in_words
from ringplane.vhost_user.transport import wake

log = logging.getLogger(__name__)

# Seconds for the requests in flight: the guests would notice more.
DRAIN_PATIENCE = 2.0

# Seconds until another process is accepted after an error.
ACCEPT_AGAIN = 0.1

STOPS = "the running process stops"


async def offer_successors(server: Server, listener: Listener) -> None:
    """Hand over all disks to a process that asks for them at this socket; returns when that is done."""
    listener.sock.setblocking(False)
    while listener.owned:
        with Channel(await _accept(listener.sock)) as channel:
            try:
                await _try_to_hand_over(server, listener, channel)
            except Exception:
                log.exception("a takeover failed because of an internal error; please report it")


async def _accept(listening: socket.socket) -> socket.socket:
    """The next one that connects. If this is cancelled, nobody is lost."""
    loop = asyncio.get_running_loop()
    while True:
        readable = loop.create_future()
        loop.add_reader(listening, wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(listening)
        try:
            return listening.accept()[0]
        except BlockingIOError:
            # It has gone, or a successor that was refused later has the socket too.
            continue
        except OSError as error:
            # For example too many open files: it waits in the queue until that has passed.
            log.warning("cannot accept a process that takes over: %s", error)
            await asyncio.sleep(ACCEPT_AGAIN)


@contextlib.asynccontextmanager
async def _refusing_others(listening: socket.socket, pid: int) -> AsyncIterator[None]:
    """In this `async with` process `pid` takes over."""
    refusing = asyncio.create_task(_refuse_all(listening, pid))
    try:
        yield
    finally:
        refusing.cancel()
        await asyncio.wait([refusing])


async def _refuse_all(listening: socket.socket, pid: int) -> None:
    while True:
        with Channel(await _accept(listening)) as channel:
            channel.refuse(f"process {pid} is taking over; try again when it has ended")


async def _try_to_hand_over(server: Server, listener: Listener, channel: Channel) -> None:
    """All disks continue here unless the other process has everything and takes it."""
    pid, _ = channel.peer
    async with contextlib.AsyncExitStack() as undo:
        try:
            async with _refusing_others(listener.sock, pid):
                await _hand_over(server, listener, channel, undo)
            if server.stopping:
                raise HandoverError(STOPS)
        except BaseException as error:
            is_expected = isinstance(error, HandoverError | EOFError | OSError)
            if is_expected:
                log.warning("process %d could not take over: %s", pid, _why(error))
            # Before the guests run here again: the other process may have everything.
            channel.refuse(_why(error))
            if not is_expected:
                raise
            return
        undo.pop_all()
    # A signal that stops the server has no effect from here on, because nothing has been waited for since the check.
    # The files of all sockets belong to the other process, whatever fails now.
    listener.owned = False
    for export in server.exports:
        export.listener.owned = False
    log.info("process %d takes over all disks", pid)
    await _leave(server, pid)
    # At once: when all disks have stopped, this task is cancelled. If it cannot be sent, we end all the same.
    with contextlib.suppress(OSError):
        channel.send({"yours": True})


async def _leave(server: Server, pid: int) -> None:
    """All steps of the end here. If one fails, the others are done all the same: nothing is served here any more."""
    with _logging_errors():
        server.at_takeover(pid)
    with _logging_errors():
        await server.release_sockets()
    for export in server.exports:
        with _logging_errors():
            await export.abandon()
    # Also what was not asked to stop because of an error.
    server.request_stop()


@contextlib.contextmanager
def _logging_errors() -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("a step after a takeover failed because of an internal error; please report it")


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, HandoverError | EOFError):
        return str(error)
    if isinstance(error, OSError):
        return in_words(error)
    return STOPS if isinstance(error, asyncio.CancelledError) else "an internal error, which its log shows"


async def _hand_over(server: Server, listener: Listener, channel: Channel, undo: contextlib.AsyncExitStack) -> None:
    """Returns, with all disks frozen, when the other process has everything and takes it; `undo` thaws them.

    Raises HandoverError, EOFError, OSError.
    """
    uid = channel.peer[1]
    if uid not in (0, os.geteuid()):
        raise HandoverError(f"user {uid} may not take over the disks of user {os.geteuid()}")
    hello = await aside(partial(channel.receive, "hello", TAKING_PATIENCE))
    if hello["hello"] != VERSION:
        raise HandoverError(
            f"this release uses version {VERSION} of the handover protocol, not version {hello['hello']}"
        )
    offered = _lasting(server)
    await aside(partial(channel.send, _offer(server, listener, offered)))
    await aside(partial(channel.receive, "ready", READY_PATIENCE))
    undo.enter_context(_unchanged(server, offered))
    await _hold_operations(server.exports, undo)
    await _freeze_all(server.exports, undo)
    await _empty_caches(server.exports)
    for export in server.exports:
        _let_go(export, undo)
    for worker in server.threads.workers.values():
        undo.callback(worker.counters.thaw)
    await aside(partial(_give_all, channel, _state_of_all(server), server.exports))


def _lasting(server: Server) -> dict[str, Any]:
    """What the offer says of changes, and of disks that are not served.

    Pauses of those that are served are a part of the state, because they may still change.
    """
    changes = dataclasses.replace(changes_of_served(server), paused=[])
    return {
        "changes": changes.as_json(),
        "unserved": server.unserved.as_json(),
        "unserved-because": dict(server.unserved_because),
    }


@contextlib.contextmanager
def _unchanged(server: Server, offered: Mapping[str, Any]) -> Iterator[None]:
    """No disk is changed in this `with`. Raises HandoverError if it is not as it was offered."""
    with server.changing.none() as under_way:
        if under_way:
            raise HandoverError("a disk is being added, removed or changed, and that has not ended; try again")
        if _lasting(server) != offered:
            raise HandoverError("disks, their limits or their policies were changed meanwhile; try again")
        yield


def _offer(server: Server, listener: Listener, offered: Mapping[str, Any]) -> dict[str, Any]:
    interface, metrics = server.interface, server.metrics
    return {
        "listener": Fd(listener.sock.fileno()),
        "interface": {"path": os.path.realpath(interface.path), "listener": Fd(interface.listener.sock.fileno())}
        if interface is not None
        else None,
        "metrics": {"address": str(metrics.options.listen), "listener": Fd(metrics.sock.fileno())}
        if metrics is not None
        else None,
        "state": server.state.hand_over() if server.state is not None else None,
        **offered,
        "disks": [
            {
                "socket_path": place(export.config),
                "options": options_of(export.config),
                "config_space": export.disk.config_space(),
                "listener": Fd(export.listener.sock.fileno()),
                "size": export.disk.source.size,
                **export.disk.source.hand_over(),
            }
            for export in server.exports
        ],
    }


def _state_of_all(server: Server) -> dict[str, Any]:
    return {
        "disks": [_state(export) for export in server.exports],
        "io_threads": thread_counters(server.threads.workers),
        "events": server.events.snapshot(),
    }


def _give_all(channel: Channel, state: Mapping[str, Any], exports: Iterable[Export]) -> None:
    """Send it, and wait until it is taken. With one thread: when the other process has it, another may not start."""
    disks = [export.disk for export in exports]
    with saved_counters(disks) as counters, saved_policies(disks) as policies:
        channel.send({**state, "counters": counters, "policies": policies})
    channel.receive("taking", TAKING_PATIENCE)


async def _hold_operations(exports: Sequence[Export], undo: contextlib.AsyncExitStack) -> None:
    """No flush or resize of ours uses the storage from now on, until `undo`; guests do not wait meanwhile.

    Raises HandoverError.
    """
    holding = (export.operations.hold(DRAIN_PATIENCE) for export in exports)
    done = await asyncio.gather(*holding, return_exceptions=True)
    for export, result in zip(exports, done, strict=True):
        if result is None:
            undo.callback(export.operations.release)
    _raise_first(exports, done)


async def _freeze_all(exports: Sequence[Export], undo: contextlib.AsyncExitStack) -> None:
    """And have `undo` thaw them. Raises HandoverError."""
    freezing = (export.freeze(DRAIN_PATIENCE) for export in exports)
    done = await asyncio.gather(*freezing, return_exceptions=True)
    for export, result in zip(exports, done, strict=True):
        if result is None:
            undo.push_async_callback(export.thaw)
    _raise_first(exports, done)


def _raise_first(exports: Sequence[Export], done: Sequence[BaseException | None]) -> None:
    """Raise a HandoverError if one of the results is an exception."""
    for export, result in zip(exports, done, strict=True):
        if result is not None:
            raise HandoverError(f"{export.name}: {result}")


async def _empty_caches(exports: Sequence[Export]) -> None:
    """The next process reads what is stored. Raises HandoverError."""
    done = await asyncio.gather(*(_empty_cache(export) for export in exports), return_exceptions=True)
    _raise_first(exports, done)


async def _empty_cache(export: Export) -> None:
    disk = export.disk
    # After a failed flush the cache may never be written. The next process learns of that flush, as guests have.
    may_be_lost = disk.source.flush_failed
    try:
        async with asyncio.timeout(DRAIN_PATIENCE) as limit:
            await disk.empty_cache()
    except OSError as error:
        # The storage may report a timeout of its own.
        if limit.expired():
            raise HandoverError(f"writing its cache took longer than {DRAIN_PATIENCE:g} seconds") from None
        if not may_be_lost:
            raise HandoverError(f"its cache cannot be written: {in_words(error)}") from None


def _let_go(export: Export, undo: contextlib.AsyncExitStack) -> None:
    """And have `undo` take its source back. Raises HandoverError."""
    undo.callback(export.disk.source.take_back)
    try:
        export.disk.source.let_go()
    except ImageError as error:
        raise HandoverError(str(error)) from None


def _state(export: Export) -> dict[str, Any]:
    disk = export.disk
    return {
        "size": disk.source.size,
        "flush_failed": disk.flush_failed,
        "paused": disk.paused,
        "throttled": disk.member.throttled_ns,
        "used_limits": export.used_limits(),
        "busy_ticks": disk.device.busy_ticks,
        "layers": [layer.snapshot() for layer in disk.layers],
        "front_end": export.session.snapshot() if export.session else None,
        "next_front_end": Fd(export.next_front_end.fileno()) if export.next_front_end else None,
    }
