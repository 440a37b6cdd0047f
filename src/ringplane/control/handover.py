"""A planned restart: a new process takes over the disks of a running one, and with them its front ends.

The running process listens on a separate socket beside that of its first disk. The new one connects there, receives
the description of the disks with their images and sockets, and prepares everything. Only then do the guests wait: the
running process stops all rings, which completes what is in flight, and sends the position of each; the new one resumes
from there. If anything fails before the new process has everything, the running one continues as if nothing had
happened.

    new                         running
    hello            ->
                     <-         offer: each disk's image, socket and options
    ready            ->         freezes all disks
                     <-         state: of each disk and its front end
    taking           ->         lets go of all of them
                     <-         yours, and exits

A failure is sent as {"refused": why}. Between the last two lines no process serves: if the running one ends there
without a message, it has let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ringplane.control.listener import Listener
from ringplane.options.disk_config import DiskConfig
from ringplane.system.signals import NONE, Signals
from ringplane.vhost_user import peers
from ringplane.vhost_user.snapshot import Fd, SessionSnapshot
from ringplane.virtio import blk

if TYPE_CHECKING:
    from ringplane.control.export import Export
    from ringplane.control.server import Server

log = logging.getLogger(__name__)

# Of the protocol, because the two processes may be of different releases.
VERSION = 1

# Of a message: bytes of JSON, and number of fds. The fds come first, FDS_AT_A_TIME each (SCM_MAX_FD is 253).
PREFIX = struct.Struct("<II")
FDS_AT_A_TIME = 200
MAX_MESSAGE = 64 << 20

# Seconds. A new process may have to compile the data plane before it is ready; during `TAKING` the guests wait.
READY_PATIENCE, DRAIN_PATIENCE, TAKING_PATIENCE = 120.0, 2.0, 5.0

# The options of a disk that a guest sees, or that other processes rely on: a restart does not change them.
FIXED = (
    "read_only",
    "direct",
    "share_rw",
    "num_queues",
    "block_size",
    "physical_block_size",
    "serial",
    "features",
    "zoned",
)

# The values of a DiskConfig as JSON.
Options = dict[str, Any]


class HandoverError(Exception):
    """The disks are not handed over, and the running process continues; the text is one line that says why."""


def socket_beside(socket_path: Path) -> Path:
    """Where a process listens for its successor, given the socket of its first disk."""
    return socket_path.with_name(f"{socket_path.name}.upgrade")


class Channel:
    """Messages over a connected UNIX socket: JSON that can contain fds (`Fd`) and bytes. Each call blocks."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over the socket."""
        self._sock = sock
        self._received: list[int] = []

    @property
    def peer(self) -> tuple[int, int]:
        """The process and its user (unix(7), SO_PEERCRED)."""
        return peers.credentials(self._sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Mapping[str, Any], patience: float = TAKING_PATIENCE) -> None:
        """The fds stay the caller's. Raises OSError, TimeoutError after so many seconds."""
        fds: list[int] = []

        def encode(value: object) -> object:
            if isinstance(value, Fd):
                fds.append(value.number)
                return {"fd": len(fds) - 1}
            if isinstance(value, bytes):
                return {"hex": value.hex()}
            assert dataclasses.is_dataclass(value)
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

        text = json.dumps(message, default=encode).encode()
        self._sock.settimeout(patience)
        self._sock.sendall(PREFIX.pack(len(text), len(fds)))
        for start in range(0, len(fds), FDS_AT_A_TIME):
            socket.send_fds(self._sock, [b"f"], fds[start : start + FDS_AT_A_TIME])
        self._sock.sendall(text)

    def receive(self, what: str, patience: float) -> dict[str, Any]:
        """The next message, which has the key `what`; its fds are closed with the channel.

        Raises HandoverError when it is a refusal or makes no sense, EOFError at the end, OSError as `send`.
        """
        self._sock.settimeout(patience)
        size, count = PREFIX.unpack(self._exactly(PREFIX.size))
        if size > MAX_MESSAGE:
            raise HandoverError(f"received a message of {size} bytes; the maximum is {MAX_MESSAGE}")
        fds: list[int] = []
        while len(fds) < count:
            _, some, _, _ = socket.recv_fds(self._sock, 1, FDS_AT_A_TIME, socket.MSG_CMSG_CLOEXEC)
            if not some:
                raise HandoverError(
                    "file descriptors were lost: this process may not open enough; raise its limit (ulimit -n)"
                )
            fds += some
            self._received += some
        try:
            message = json.loads(self._exactly(size), object_hook=lambda value: _decode(value, fds))
        except (ValueError, LookupError, TypeError) as error:
            raise HandoverError(f"received a malformed message: {error}") from None
        if not isinstance(message, dict) or "refused" in message:
            raise HandoverError(
                str(message["refused"]) if isinstance(message, dict) else "received a message that is not an object"
            )
        if what not in message:
            raise HandoverError(f"expected {what!r} but received another message")
        return message

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._sock.recv(size - len(data))
            if not part:
                raise EOFError("the other process has ended")
            data += part
        return bytes(data)

    def close(self) -> None:
        """Also wakes a thread that blocks in it. May be called again."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        fds, self._received = self._received, []
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _decode(value: dict[str, Any], fds: Sequence[int]) -> object:
    if value.keys() == {"fd"}:
        return Fd(fds[value["fd"]])
    if value.keys() == {"hex"}:
        return bytes.fromhex(value["hex"])
    return value


# The running process.


async def offer_successors(server: Server, listener: Listener) -> None:
    """Hand over all disks of the server to a process that asks for them at this socket; returns when that is done."""
    listener.sock.setblocking(False)
    loop = asyncio.get_running_loop()
    while listener.owned:
        sock, _ = await loop.sock_accept(listener.sock)
        with Channel(sock) as channel:
            await _try_to_hand_over(server, listener, channel)


async def _try_to_hand_over(server: Server, listener: Listener, channel: Channel) -> None:
    pid, uid = channel.peer
    try:
        if uid not in (0, os.geteuid()):
            raise HandoverError(f"user {uid} may not take over the disks of user {os.geteuid()}")
        hello = await asyncio.to_thread(channel.receive, "hello", TAKING_PATIENCE)
        if hello["hello"] != VERSION:
            raise HandoverError(
                f"this release uses version {VERSION} of the handover protocol, not version {hello['hello']}"
            )
        await asyncio.to_thread(channel.send, _offer(server.exports, listener))
        await asyncio.to_thread(channel.receive, "ready", READY_PATIENCE)
        await _hand_over(server.exports, channel)
    except (HandoverError, EOFError, OSError) as error:
        why = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        log.warning("process %d could not take over: %s", pid, why)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(channel.send, {"refused": why})
        return
    listener.owned = False
    log.info("process %d takes over all disks", pid)
    for export in server.exports:
        await export.abandon()
    # At once: when all disks have stopped, this task is cancelled. If it cannot be sent, we end all the same.
    with contextlib.suppress(OSError):
        channel.send({"yours": True})


def _offer(exports: Sequence[Export], listener: Listener) -> dict[str, Any]:
    return {
        "listener": Fd(listener.sock.fileno()),
        "disks": [
            {
                "socket_path": os.path.realpath(export.config.socket_path or ""),
                "options": options_of(export.config),
                "config_space": export.disk.config_space(),
                "image": Fd(export.disk.image.fd),
                "listener": Fd(export.listener.sock.fileno()),
                "size": export.disk.image.size,
            }
            for export in exports
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
    """And have `undo` thaw them. Raises HandoverError; where requests take too long, only after they have ended."""
    freezing = [asyncio.create_task(export.freeze()) for export in exports]
    _, late = await asyncio.wait(freezing, timeout=DRAIN_PATIENCE)
    problem = f"requests in flight took longer than {DRAIN_PATIENCE:.0f} seconds" if late else ""
    for export, result in zip(exports, await asyncio.gather(*freezing, return_exceptions=True), strict=True):
        if result is None:
            undo.push_async_callback(export.thaw)
        else:
            problem = f"{export.disk.image.path.name}: {result}"
    if problem:
        raise HandoverError(problem)


def _state(export: Export) -> dict[str, Any]:
    disk = export.disk
    return {
        "size": disk.image.size,
        "flush_failed": disk.flush_failed,
        "zones": disk.zones.snapshot() if disk.zones else None,
        "front_end": export.session.snapshot() if export.session else None,
        "next_front_end": Fd(export.next_front_end.fileno()) if export.next_front_end else None,
    }


def options_of(config: DiskConfig) -> Options:
    """The FIXED options as JSON."""
    options = {name: getattr(config, name) for name in FIXED}
    options["features"] = dict(config.features)
    options["zoned"] = dataclasses.asdict(config.zoned) if config.zoned else None
    return options


# The new process.


class Predecessor:
    """The running process, seen by its successor. Used in a `with`; leaving it before `take` changes nothing."""

    def __init__(self, configs: Sequence[DiskConfig], signals: Signals = NONE) -> None:
        """Find the process that serves these disks; raises HandoverError, Interrupted."""
        self._configs = configs
        self._signals = signals
        self._path, sock = _connect([config.socket_path for config in configs if config.socket_path])
        self._channel = Channel(sock)
        try:
            with _in_words():
                self.pid = self._channel.peer[0]
                self._channel.send({"hello": VERSION})
                offer = self._answer(TAKING_PATIENCE)
                self._listener: Fd = offer["listener"]
                self._disks = _in_order(offer["disks"], configs)
        except BaseException:
            self._channel.close()
            raise

    def image(self, index: int) -> tuple[int, int]:
        """The image of disk `index`: a new fd, and how many bytes of it are served."""
        return os.dup(self._disks[index]["image"].number), self._disks[index]["size"]

    def listener(self, index: int) -> Listener:
        """The socket of disk `index`; its file is not ours to remove before `take`."""
        return _listener(self._disks[index]["listener"], self._configs[index].socket_path)

    def take(self, exports: Sequence[Export]) -> Listener:
        """Resume all front ends from where they are; returns the socket for our own successor.

        Raises HandoverError, and Interrupted up to the moment when the running process lets go. The disks are served by
        nobody from then on until the exports are.
        """
        with _in_words():
            for export, disk in zip(exports, self._disks, strict=True):
                _check_config_space(export, disk["config_space"])
            self._channel.send({"ready": True})
            # The requests in flight may take long; a refusal because of that arrives after they have ended.
            state = self._answer(READY_PATIENCE)
            for export, disk in zip(exports, self._disks, strict=True):
                _resume_from(export, disk, state["disks"][disk["number"]])
            self._channel.send({"taking": True})
            # A process that ends without having read this resets the connection.
            with contextlib.suppress(EOFError, ConnectionResetError):
                self._channel.receive("yours", READY_PATIENCE)
        mine = _listener(self._listener, self._path)
        for listener in [mine, *(export.listener for export in exports)]:
            listener.owned = True
        return mine

    def _answer(self, patience: float) -> dict[str, Any]:
        """The running process says something of its disks. Raises what `Channel.receive` does, and Interrupted."""
        if not self._signals.wait(self._channel.fileno(), patience):
            raise TimeoutError
        return self._channel.receive("disks", patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def _connect(paths: Sequence[Path]) -> tuple[Path, socket.socket]:
    """To the first of the disks' sockets beside which a process listens."""
    for path in map(socket_beside, paths):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
            return path, sock
        except OSError:
            sock.close()
    raise HandoverError(
        f"{paths[0] if paths else 'a disk without a socket path'}: no running ringplane serves there; "
        "start one without --upgrade"
    )


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Turn every failure inside into a HandoverError."""
    try:
        yield
    except HandoverError as error:
        raise HandoverError(f"the running process continues to serve: {error}") from None
    except TimeoutError:
        raise HandoverError("the running process does not answer") from None
    except (EOFError, OSError, LookupError, TypeError, ValueError) as error:
        raise HandoverError(f"cannot take over from the running process: {error or type(error).__name__}") from None


def _in_order(disks: Sequence[dict[str, Any]], configs: Sequence[DiskConfig]) -> list[dict[str, Any]]:
    """The offer for each of our disks; raises HandoverError unless both processes have the same disks."""
    offered = {disk["socket_path"]: disk | {"number": number} for number, disk in enumerate(disks)}
    wanted = {os.path.realpath(config.socket_path or ""): config for config in configs}
    if offered.keys() != wanted.keys():
        other = sorted(offered.keys() ^ wanted.keys())[0]
        raise HandoverError(f"{other} is served by only one of the two processes; both must serve the same disks")
    for path, config in wanted.items():
        _check_options(path, config, offered[path])
    return [offered[path] for path in wanted]


def _check_options(path: str, config: DiskConfig, disk: dict[str, Any]) -> None:
    ours, its = options_of(config), disk["options"]
    for name in FIXED:
        if its.get(name) != ours[name]:
            option = name.replace("_", "-")
            raise HandoverError(
                f"{path}: {option} is {its.get(name)} in the running process and {ours[name]} here; "
                "an upgrade cannot change it"
            )
    if not os.path.samestat(os.stat(config.image), os.fstat(disk["image"].number)):
        raise HandoverError(f"{path}: {config.image} is not the image that the running process serves")


def _check_config_space(export: Export, there: bytes) -> None:
    """Raises HandoverError if it changes, because a guest reads it only once."""
    here = export.disk.config_space()
    fields = blk.CONFIG.names or ()
    old, new = (np.frombuffer(space.ljust(blk.CONFIG.itemsize, b"\0"), blk.CONFIG, 1)[0] for space in (there, here))
    changed = [name for name in fields if old[name].tobytes() != new[name].tobytes()]
    if changed:
        raise HandoverError(f"{export.disk.image.path.name}: the guest would see a change of {', '.join(changed)}")


def _resume_from(export: Export, offered: dict[str, Any], saved: dict[str, Any]) -> None:
    if saved["size"] != offered["size"]:
        raise HandoverError(f"{export.disk.image.path.name}: its size is being changed; try again")
    if saved["flush_failed"]:
        export.disk.set_flush_failed()
    if export.disk.zones:
        export.disk.zones.resume_from(saved["zones"])
    if saved["front_end"]:
        export.resume_from(SessionSnapshot.from_json(saved["front_end"]))
    if saved.get("next_front_end"):
        export.resume_waiting(saved["next_front_end"].number)


def _listener(fd: Fd, path: Path | None) -> Listener:
    listener = Listener(socket.socket(fileno=os.dup(fd.number)), path)
    listener.owned = False
    return listener
