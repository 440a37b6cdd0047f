"""Connections to NBD servers, over UNIX sockets and TCP, made within a time limit."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Sequence

from ringplane.block.sources.nbd.handshake import Export, HandshakeError, Silent, negotiate
from ringplane.opener.opener import LOCAL, Opener
from ringplane.opener.server_places import Place
from ringplane.options import image_address
from ringplane.options.nbd_uri import NbdUri
from ringplane.system.notes import REMEDIES, in_words
from ringplane.system.signals import NONE, Signals

# Seconds for connection and handshake, for all addresses of a server.
PATIENCE = 10.0

# Seconds between two looks for a signal, or for room in the queue of a socket that listens.
PAUSE = 0.1

# A peer that does not answer for this long has lost its machine or network: seconds until it is asked, between two
# questions, and their number (tcp(7)). They are asked while nothing is on its way to it; else see silence.py.
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}

# Bytes of requests in a UNIX socket, as far as the system allows (net.core.wmem_max), where 208 KiB are the default:
# deep 64 KiB writes to qemu-nbd take 10.8 instead of 15.1 us of CPU time each. TCP finds the right size itself.
ROOM_TO_SEND = 1 << 20


def find_places(uri: NbdUri, signals: Signals = NONE) -> Sequence[Place]:
    """Where its server is: what its name means now. Raises HandshakeError, Interrupted."""
    [found] = image_address.find_places([uri], signals)
    if isinstance(found, OSError):
        # A name server may be the one that does not answer.
        kind = Silent if found.errno in (errno.ETIMEDOUT, socket.EAI_AGAIN) else HandshakeError
        raise kind(f"cannot be found: {found.strerror or found}; check the name of its host")
    return found


def connect(
    places: Sequence[Place], export: str, signals: Signals = NONE, patience: float = PATIENCE, opener: Opener = LOCAL
) -> tuple[socket.socket, Export]:
    """A connection that is ready for the transmission. Raises HandshakeError, OpenerEnded, Interrupted."""
    end = time.monotonic() + patience
    error = HandshakeError("has no address")
    for number, place in enumerate(places):
        try:
            return _connect_to(place, export, signals, _share(end, len(places) - number), opener)
        except HandshakeError as why:
            error = why
        except OSError as why:
            # No fd is left, or this machine does not support the protocol.
            error = _unreachable(why)
    raise error


def _share(end: float, places: int) -> float:
    """When the first of so many places has had its part of the time: one that does not answer leaves some to others."""
    now = time.monotonic()
    return now + (end - now) / places


def _connect_to(
    place: Place, export: str, signals: Signals, end: float, opener: Opener
) -> tuple[socket.socket, Export]:
    sock = _begun(place, signals, end, opener)
    try:
        _connect(sock, place, signals, end)
        return sock, negotiate(_Waiting(sock, signals, end), export)
    except BaseException:
        sock.close()
        raise


def _begun(place: Place, signals: Signals, end: float, opener: Opener) -> socket.socket:
    """A socket that connects there, or is connected. Raises HandshakeError, OpenerEnded, OSError, Interrupted."""
    while True:
        try:
            return opener.connect(place, _left(signals, end))
        except BlockingIOError:
            # The queue of a UNIX socket is full.
            time.sleep(min(PAUSE, _left(signals, end)))


def _unreachable(error: OSError) -> HandshakeError:
    advice = "" if error.errno in REMEDIES else "; start it, or check its address"
    if error.errno == errno.EAFNOSUPPORT:
        advice = "; in a systemd unit, change RestrictAddressFamilies (docs/remote.md)"
    return HandshakeError(f"cannot be reached: {in_words(error)}{advice}")


def _left(signals: Signals, end: float) -> float:
    """Seconds until the end. Raises HandshakeError after it, and Interrupted."""
    signals.check()
    left = end - time.monotonic()
    if left <= 0:
        raise Silent("does not answer: no connection in time; check its address and the network")
    return left


def _connect(sock: socket.socket, place: Place, signals: Signals, end: float) -> None:
    while not _is_writable(sock, min(PAUSE, _left(signals, end))):
        pass
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise _unreachable(OSError(code, os.strerror(code)))
    if place[0] == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_TO_SEND)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_writable(sock: socket.socket, timeout: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(timeout * 1000))


class _Waiting:
    """See Stream."""

    def __init__(self, sock: socket.socket, signals: Signals, end: float) -> None:
        self._sock, self._signals, self._end = sock, signals, end

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not self._signals.wait(self._sock.fileno(), max(self._end - time.monotonic(), 0)):
                raise Silent("does not answer: no handshake in time; check its address, and whether it hangs")
            with contextlib.suppress(BlockingIOError):
                part = self._receive(size - len(data))
                if not part:
                    raise HandshakeError("closed the connection during the handshake")
                data += part
        return data

    def _receive(self, size: int) -> bytes:
        try:
            return self._sock.recv(size)
        except BlockingIOError:
            raise
        except OSError as error:
            raise HandshakeError(f"broke the connection during the handshake: {error.strerror}") from None

    def write(self, data: bytes) -> None:
        """The first few KiB of a connection always have room."""
        try:
            if self._sock.send(data, socket.MSG_NOSIGNAL) != len(data):
                raise HandshakeError("does not read what it is sent during the handshake")
        except BlockingIOError:
            raise HandshakeError("does not read what it is sent during the handshake") from None
        except OSError as error:
            raise HandshakeError(f"broke the connection during the handshake: {error.strerror}") from None
