"""The running process of a planned restart (handover.py): it offers its disks, freezes them, and lets go of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

from ringplane.control.export import Export
from ringplane.control.handover import READY_PATIENCE, TAKING_PATIENCE, VERSION, Channel, HandoverError, options_of
from ringplane.control.listener import Listener
from ringplane.control.server import Server
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
    exports = server.exports
    pid, uid = channel.peer
    try:
        if uid not in (0, os.geteuid()):
            raise HandoverError(f"user {uid} may not take over the disks of user {os.geteuid()}")
        hello = await asyncio.to_thread(channel.receive, "hello", TAKING_PATIENCE)
        if hello["hello"] != VERSION:
            raise HandoverError(
                f"this release uses version {VERSION} of the handover protocol, not version {hello['hello']}"
            )
        await asyncio.to_thread(channel.send, _offer(server, listener))
        await asyncio.to_thread(channel.receive, "ready", READY_PATIENCE)
        if server.exports != exports:
            raise HandoverError("disks were added or removed meanwhile; try again")
        await _hand_over(exports, channel)
    except (HandoverError, EOFError, OSError) as error:
        why = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        log.warning("process %d could not take over: %s", pid, why)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(channel.send, {"refused": why})
        return
    listener.owned = False
    log.info("process %d takes over all disks", pid)
    server.abandon_interface()
    for export in exports:
        await export.abandon()
    # At once: when all disks have stopped, this task is cancelled. If it cannot be sent, we end all the same.
    with contextlib.suppress(OSError):
        channel.send({"yours": True})


def _offer(server: Server, listener: Listener) -> dict[str, Any]:
    interface, metrics = server.interface, server.metrics
    return {
        "listener": Fd(listener.sock.fileno()),
        "interface": {"path": os.path.realpath(interface.path), "listener": Fd(interface.listener.sock.fileno())}
        if interface is not None
        else None,
        "metrics": {"address": str(metrics.options.listen), "listener": Fd(metrics.sock.fileno())}
        if metrics is not None
        else None,
        "disks": [
            {
                "socket_path": os.path.realpath(export.config.socket_path or ""),
                "options": options_of(export.config),
                "config_space": export.disk.config_space(),
                "listener": Fd(export.listener.sock.fileno()),
                "size": export.disk.source.size,
                **export.disk.source.hand_over(),
            }
            for export in server.exports
        ],
    }


async def _hand_over(exports: Sequence[Export], channel: Channel) -> None:
    """Returns, with all disks frozen, when the other process has everything. If it raises, all disks are thawed."""
    async with contextlib.AsyncExitStack() as undo:
        await _freeze_all(exports, undo)
        await asyncio.to_thread(channel.send, {"disks": [_state(export) for export in exports]})
        await asyncio.to_thread(channel.receive, "taking", TAKING_PATIENCE)
        undo.pop_all()


async def _freeze_all(exports: Sequence[Export], undo: contextlib.AsyncExitStack) -> None:
    """And have `undo` thaw them. Raises HandoverError."""
    problem = ""
    freezing = (export.freeze(DRAIN_PATIENCE) for export in exports)
    for export, result in zip(exports, await asyncio.gather(*freezing, return_exceptions=True), strict=True):
        if result is None:
            undo.push_async_callback(export.thaw)
        else:
            problem = f"{export.disk.name}: {result}"
    if problem:
        raise HandoverError(problem)


def _state(export: Export) -> dict[str, Any]:
    disk = export.disk
    return {
        "size": disk.source.size,
        "flush_failed": disk.flush_failed,
        "paused": disk.paused,
        "layers": [layer.snapshot() for layer in disk.layers],
        "front_end": export.session.snapshot() if export.session else None,
        "next_front_end": Fd(export.next_front_end.fileno()) if export.next_front_end else None,
    }
