"""A small NBD server for tests, whose faults are functions of the test; tests/storage has real servers."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ringplane.block.sources.nbd import protocol as nbd

HAS_FLAGS = 1
EVERYTHING = (
    HAS_FLAGS
    | nbd.FLAG_SEND_FLUSH
    | nbd.FLAG_SEND_FUA
    | nbd.FLAG_SEND_TRIM
    | nbd.FLAG_SEND_WRITE_ZEROES
    | nbd.FLAG_CAN_MULTI_CONN
)
REQUEST = struct.Struct(">IHH8sQI")


@dataclass
class Request:
    """A request as it came. `cookie` is not decoded."""

    flags: int
    command: int
    cookie: bytes
    offset: int
    length: int
    data: bytes = b""


def simple(request: Request, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">II", nbd.SIMPLE_MAGIC, error) + request.cookie + data


def chunk(request: Request, kind: int, payload: bytes = b"", *, done: bool = False) -> bytes:
    return (
        struct.pack(">IHH", nbd.STRUCTURED_MAGIC, done, kind)
        + request.cookie
        + struct.pack(">I", len(payload))
        + payload
    )


def data_chunk(request: Request, offset: int, data: bytes, *, done: bool = False) -> bytes:
    return chunk(request, nbd.TYPE_OFFSET_DATA, struct.pack(">Q", offset) + data, done=done)


def hole_chunk(request: Request, offset: int, size: int, *, done: bool = False) -> bytes:
    return chunk(request, nbd.TYPE_OFFSET_HOLE, struct.pack(">QI", offset, size), done=done)


def error_chunk(request: Request, error: int, message: bytes = b"", *, done: bool = True) -> bytes:
    return chunk(request, nbd.ERROR_TYPE + 1, struct.pack(">IH", error, len(message)) + message, done=done)


class HangUp(Exception):
    """Raised by a reply: the server closes the connection."""


# What is sent for a request; None: what the server would send. The second argument is the server.
Reply = Callable[[Request, "NbdServer"], bytes | None]


@dataclass
class NbdServer:
    """Serves `content` at a UNIX socket, or at a TCP port; each connection is a thread."""

    path: Path
    content: bytearray
    structured: bool = True
    flags: int = EVERYTHING
    block_sizes: tuple[int, int, int] | None = (1, 4096, 32 << 20)
    reply: Reply = lambda request, server: None
    # What is sent instead of the greeting, for hostile servers.
    greeting: Callable[[socket.socket], bool] = lambda sock: True
    go_supported: bool = True
    # After the handshake.
    hangs_up: bool = False
    # 0 becomes one that is free; None: it listens at `path`.
    port: int | None = None
    requests: list[Request] = field(default_factory=list)
    connections: list[socket.socket] = field(default_factory=list)
    accepted: int = 0

    def __post_init__(self) -> None:
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.path}" if self.port is None else f"nbd://127.0.0.1:{self.port}/disk"

    def start(self) -> None:
        listener = self._listener = self._listen()
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _listen(self) -> socket.socket:
        if self.port is not None:
            listener = socket.create_server(("127.0.0.1", self.port))
            self.port = listener.getsockname()[1]
            return listener
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen()
        return listener

    def stop(self) -> None:
        """As if it had been killed."""
        if self._listener is not None:
            self.path.unlink(missing_ok=True)
            # close() alone does not end an accept() of another thread.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.drop_connections()

    def drop_connections(self) -> None:
        with self._lock:
            for sock in self.connections:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self.connections.clear()

    def commands(self) -> list[int]:
        with self._lock:
            return [request.command for request in self.requests]

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with self._lock:
                    self.connections.append(sock)
                    self.accepted += 1
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError, HangUp):
            if self.greeting(sock):
                self._negotiate(sock)
                while not self.hangs_up:
                    sock.sendall(self._answer(_request(sock)))
            else:
                # Until the client gives up.
                sock.recv(1)

    def _negotiate(self, sock: socket.socket) -> None:
        flags = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES
        sock.sendall(struct.pack(">8sQH", nbd.MAGIC, nbd.OPTION_MAGIC, flags))
        _read(sock, 4)
        while True:
            _, option, length = struct.unpack(">QII", _read(sock, 16))
            _read(sock, length)
            if option == nbd.OPT_STRUCTURED_REPLY and self.structured:
                sock.sendall(option_reply(option, nbd.REP_ACK))
            elif option == nbd.OPT_GO and self.go_supported:
                information = struct.pack(">HQH", nbd.INFO_EXPORT, len(self.content), self.flags)
                sock.sendall(option_reply(option, nbd.REP_INFO, information))
                if self.block_sizes:
                    sizes = struct.pack(">HIII", nbd.INFO_BLOCK_SIZE, *self.block_sizes)
                    sock.sendall(option_reply(option, nbd.REP_INFO, sizes))
                sock.sendall(option_reply(option, nbd.REP_ACK))
                return
            elif option == nbd.OPT_EXPORT_NAME:
                sock.sendall(struct.pack(">QH", len(self.content), self.flags))
                return
            else:
                sock.sendall(option_reply(option, nbd.REP_ERR_UNSUP, b"not this"))

    def _answer(self, request: Request) -> bytes:
        with self._lock:
            self.requests.append(request)
        special = self.reply(request, self)
        return self.usual(request) if special is None else special

    def usual(self, request: Request) -> bytes:
        start, end = request.offset, request.offset + request.length
        if request.command == nbd.CMD_READ:
            data = bytes(self.content[start:end])
            return data_chunk(request, start, data, done=True) if self.structured else simple(request, data=data)
        if request.command == nbd.CMD_WRITE:
            self.content[start:end] = request.data
        elif request.command in (nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            self.content[start:end] = bytes(request.length)
        return simple(request)


def in_pieces(server: NbdServer, request: Request, chance: random.Random) -> list[bytes]:
    """Chunks with the data of a read, in any order; the last one says that it is the last."""
    cuts = sorted({0, request.length, *(chance.randrange(request.length) for _ in range(chance.randrange(9)))})
    pieces = list(itertools.pairwise(cuts))
    chance.shuffle(pieces)
    empty_end = chance.random() < 0.5
    found = []
    for number, (start, end) in enumerate(pieces, 1):
        place, done = request.offset + start, number == len(pieces) and not empty_end
        data = bytes(server.content[place : place + end - start])
        if any(data):
            found.append(data_chunk(request, place, data, done=done))
        else:
            found.append(hole_chunk(request, place, len(data), done=done))
    return [*found, chunk(request, nbd.TYPE_NONE, done=True)] if empty_end else found


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _request(sock: socket.socket) -> Request:
    magic, flags, command, cookie, offset, length = REQUEST.unpack(_read(sock, REQUEST.size))
    assert magic == nbd.REQUEST_MAGIC
    if command == nbd.CMD_DISC:
        raise HangUp
    data = _read(sock, length) if command == nbd.CMD_WRITE else b""
    return Request(flags, command, cookie, offset, length, data)
