"""A planned restart: a new process takes over the disks of a running one, and with them its front ends.

The running process listens on a separate socket beside that of its API, or of its first disk. The new one connects
there, receives the description of the disks with their images and sockets, and prepares everything. Only then do the
guests wait: the running process stops all rings, which completes what is in flight, and sends the position of each; the
new one resumes from there. If anything fails before the new process has everything, the running one continues as if
nothing had happened.

    new                         running
    hello            ->
                     <-         offer: each disk's image, socket and options; the sockets of API and metrics; what was
                                changed at run time (changes.py), also of disks that are not served; the files of its
                                state (state_file.py)
    ready            ->         freezes all disks, and lets nobody change them
                     <-         state: of each disk, its limits and its front end; events; counters (handed_counters.py)
    taking           ->         lets go of all of them
                     <-         yours, and exits

What a release does not send has not been changed, and what one does not know it leaves out of account; a disk that was
added at run time is then a disk too many, and the takeover is refused.

A failure is sent as {"refused": why}. Between the last two lines no process serves: if the running one ends there
without a message, it has let go. So whatever ends the work of a process that continues, it refuses first, without
waiting: one that has sent `taking` has read all before, so there is room for that message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ringplane.options.declare import Option, declared
from ringplane.options.disk_config import DiskConfig, DiskOptions
from ringplane.system.fd import Fd
from ringplane.vhost_user import peers

# Of the protocol, because the two processes may be of different releases.
VERSION = 2

# Of a message: bytes of JSON, and number of fds. The fds come first, FDS_AT_A_TIME each (SCM_MAX_FD is 253).
PREFIX = struct.Struct("<II")
FDS_AT_A_TIME = 200
MAX_MESSAGE = 64 << 20

# Seconds. A new process may have to compile the data plane before it is ready; during `TAKING` the guests wait.
READY_PATIENCE, TAKING_PATIENCE = 120.0, 5.0

# The values of a DiskConfig as JSON.
OptionValues = dict[str, Any]


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

    def refuse(self, why: str) -> None:
        """Send that nothing is handed over, unless the other process reads nothing or has ended; does not wait."""
        text = json.dumps({"refused": why}).encode()
        with contextlib.suppress(OSError):
            self._sock.send(PREFIX.pack(len(text), 0) + text, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

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
        except (ValueError, LookupError, TypeError, RecursionError) as error:
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


def options_of(config: DiskConfig) -> OptionValues:
    """Those that an upgrade cannot change, as JSON."""
    return {option.name: plain(getattr(config, option.name)) for option in fixed_options()}


def fixed_options() -> list[Option]:
    """The options that an upgrade cannot change."""
    return [option for option in declared(DiskOptions).values() if option.fixed]


def plain(value: Any) -> Any:
    """The value of an option as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else value
