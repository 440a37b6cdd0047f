"""Buffers: lists of IOVEC structs, given by the address of the first one."""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.native.access import copy, view
from ringplane.native.uio import IOVEC, IOVEC_SIZE


@compiled
def copy_from(iov, target, size):
    """Copy the first `size` bytes of the buffers to `target`; the buffers are at least that large."""
    while size > 0:
        iovec = view(iov, IOVEC)
        part = min(size, iovec.len)
        copy(target, iovec.base, part)
        target += part
        size -= part
        iov += IOVEC_SIZE


@compiled
def copy_to(iov, source, size):
    """Copy `size` bytes from `source` to the start of the buffers; the buffers are at least that large."""
    while size > 0:
        iovec = view(iov, IOVEC)
        part = min(size, iovec.len)
        copy(iovec.base, source, part)
        source += part
        size -= part
        iov += IOVEC_SIZE


@compiled
def consume(io, size):
    """Drop the first `size` bytes of the buffers of this I/O."""
    while io.iov_count > 0:
        iovec = view(io.iov, IOVEC)
        if size < iovec.len:
            iovec.base += size
            iovec.len -= size
            return
        size -= iovec.len
        io.iov += IOVEC_SIZE
        io.iov_count -= 1


@compiled
def restore(io, first, dropped):
    """Undo one call of `consume`: the list began at address `first`, and `dropped` bytes were dropped from it."""
    partly = view(io.iov, IOVEC)
    while io.iov > first:
        io.iov -= IOVEC_SIZE
        io.iov_count += 1
        dropped -= view(io.iov, IOVEC).len
    partly.base -= dropped
    partly.len += dropped
