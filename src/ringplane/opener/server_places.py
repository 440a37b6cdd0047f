"""Where servers elsewhere are, and sockets that begin to connect there."""

from __future__ import annotations

import errno
import os
import socket

# What socket(2) and connect(2) need.
Place = tuple[int, str | tuple[object, ...]]

# Of places as texts: after the family, a path or the parts of an address.
SEPARATOR = " "


def connect(place: Place) -> socket.socket:
    """A socket that connects there, or is connected; it does not block. Raises OSError.

    BlockingIOError: the queue of a UNIX socket is full; try again.
    """
    family, address = place
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    code = sock.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(code, os.strerror(code))
    return sock


def shown(place: Place) -> str:
    """For people."""
    _, address = place
    if isinstance(address, str):
        return address
    host, port = map(str, address[:2])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def as_text(place: Place) -> str:
    """As an argument of a process."""
    family, address = place
    parts = (address,) if isinstance(address, str) else address
    return SEPARATOR.join(map(str, (int(family), *parts)))


def from_text(text: str) -> Place:
    """What `as_text` has made."""
    family, _, rest = text.partition(SEPARATOR)
    if int(family) == socket.AF_UNIX:
        return int(family), rest
    host, *numbers = rest.split(SEPARATOR)
    return int(family), (host, *map(int, numbers))
