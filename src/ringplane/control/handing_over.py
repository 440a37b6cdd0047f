"""The running process of a planned restart (handover.py): it offers its disks, freezes them, and lets go of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ringplane.block.image import ImageError
from ringplane.control.changes import Changes
from ringplane.control.export import Export
from ringplane.control.handed_counters import saved_counters, thread_counters
from ringplane.control.handover import READY_PATIENCE, TAKING_PATIENCE, VERSION, Channel, HandoverError, options_of
from ringplane.control.listener import Listener
from ringplane.control.planned import place
from ringplane.control.present_changes import changes_of
from ringplane.control.server import Server
from ringplane.system.aside import aside
from ringplane.system.fd import Fd

log = logging.getLogger(__name__)

# Seconds for the requests in flight: the guests would notice more.
DRAIN_PATIENCE = 2.0


async def offer_successors(server: Server, listener: Listener) -> None:
    """Hand over all disks to a process that asks for them at this socket; returns when that is done."""
    listener.sock.setblocking(False)
    loop = asyncio.get_running_loop()
    while listener.owned:
        sock, _ = await loop.sock_accept(listener.sock)
        with Channel(sock) as channel:
            await _try_to_hand_over(server, listener, channel)


async def _try_to_hand_over(server: Server, listener: Listener, channel: Channel) -> None:
    with contextlib.ExitStack() as held:
        await _hand_over_in(server, listener, channel, held)


async def _hand_over_in(server: Server, listener: Listener, channel: Channel, held: contextlib.ExitStack) -> None:
    """`held`: what lasts until the disks are handed over, or are not."""
    pid, uid = channel.peer
    try:
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
        held.enter_context(_unchanged(server, offered))
        await _hand_over(server, channel)
    except (HandoverError, EOFError, OSError) as error:
        why = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        log.warning("process %d could not take over: %s", pid, why)
        with contextlib.suppress(OSError):
            await aside(partial(channel.send, {"refused": why}))
        return
    listener.owned = False
    log.info("process %d takes over all disks", pid)
    server.at_takeover(pid)
    await server.release_sockets()
    for export in server.exports:
        await export.abandon()
    # At once: when all disks have stopped, this task is cancelled. If it cannot be sent, we end all the same.
    with contextlib.suppress(OSError):
        channel.send({"yours": True})


def _lasting(server: Server) -> Changes:
    """What the offer says of changes. Pauses are a part of the state, because they may still change."""
    return dataclasses.replace(changes_of(server), paused=[])


@contextlib.contextmanager
def _unchanged(server: Server, offered: Changes) -> Iterator[None]:
    """No disk is changed in this `with`. Raises HandoverError if it is not as it was offered."""
    with server.changing.none() as under_way:
        if under_way:
            raise HandoverError("a disk is being added, removed or changed, and that has not ended; try again")
        if _lasting(server) != offered:
            raise HandoverError("disks or their limits were changed meanwhile; try again")
        yield


def _offer(server: Server, listener: Listener, offered: Changes) -> dict[str, Any]:
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
        "changes": offered.as_json(),
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


async def _hand_over(server: Server, channel: Channel) -> None:
    """Returns, with all disks frozen, when the other process has everything. If it raises, all disks are thawed."""
    async with contextlib.AsyncExitStack() as undo:
        await _hold_operations(server.exports, undo)
        await _freeze_all(server.exports, undo)
        await _empty_caches(server.exports)
        for export in server.exports:
            _let_go(export, undo)
        for worker in server.threads.workers.values():
            undo.callback(worker.counters.thaw)
        state = {
            "disks": [_state(export) for export in server.exports],
            "io_threads": thread_counters(server.threads.workers),
            "events": server.events.snapshot(),
        }
        await aside(partial(_send_with_counters, channel, state, server.exports))
        await aside(partial(channel.receive, "taking", TAKING_PATIENCE))
        undo.pop_all()


def _send_with_counters(channel: Channel, state: Mapping[str, Any], exports: Iterable[Export]) -> None:
    with saved_counters(export.disk for export in exports) as counters:
        channel.send({**state, "counters": counters})


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


async def _empty_caches(exports: Iterable[Export]) -> None:
    """The next process reads what is stored. Raises HandoverError."""
    try:
        async with asyncio.timeout(DRAIN_PATIENCE):
            await asyncio.gather(*(export.disk.empty_cache() for export in exports))
    except TimeoutError:
        raise HandoverError(f"writing the cache of a disk took longer than {DRAIN_PATIENCE:g} seconds") from None
    except OSError as error:
        raise HandoverError(f"the cache of a disk cannot be written: {error.strerror}") from None


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
