"""A TCP socket to listen at: bound before the process is confined, and used by no other program."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from ringplane.control.listener import ListenError
from ringplane.options.addresses import Address

PROBLEMS = {
    errno.EADDRINUSE: "another process is listening there; choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have this address; choose one that ip(8) shows",
    errno.EACCES: "this user may not use this port; choose one from 1024 on",
    errno.EAFNOSUPPORT: "this process may not use TCP over this kind of address; "
    "in a systemd unit, change RestrictAddressFamilies (docs/metrics.md)",
}


def bound(address: Address) -> socket.socket:
    """A socket that is bound and does not listen yet: nobody can connect. Raises ListenError."""
    with contextlib.ExitStack() as undo:
        try:
            # With protocol 0 asyncio does not call setsockopt(2) for each connection, which the sandbox forbids.
            # Connections inherit TCP_NODELAY.
            sock = undo.enter_context(socket.socket(address.family, socket.SOCK_STREAM, 0))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if address.family is socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address.host, address.port))
        except OSError as error:
            raise cannot_listen(address, error) from None
        undo.pop_all()
    return sock


def cannot_listen(address: Address, error: OSError) -> ListenError:
    """The error of bind(2) or listen(2) in words."""
    why = PROBLEMS.get(
        error.errno or 0, f"cannot listen there: {os.strerror(error.errno or 0)}; choose another address"
    )
    return ListenError(f"{address}: {why}")


def from_fd(fd: int, address: Address) -> socket.socket:
    """The same socket of another process, of which `fd` is a duplicate."""
    return socket.socket(address.family, socket.SOCK_STREAM, 0, fileno=os.dup(fd))
