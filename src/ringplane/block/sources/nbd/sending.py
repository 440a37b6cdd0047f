"""Sending: all requests that wait go to the socket with as few calls as possible, data straight from guests' memory."""

from __future__ import annotations

import select
from errno import EAGAIN, EINTR

from ringplane.block.sources.nbd.layout import BROKEN, HEADER, SENT, request_at
from ringplane.block.sources.nbd.losing import give_up
from ringplane.block.sources.nbd.protocol import REQUEST_SIZE
from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of, view
from ringplane.native.epoll import EPOLL_CTL_MOD, EPOLL_EVENT
from ringplane.native.sockets import MESSAGE
from ringplane.native.syscalls import MSG_DONTWAIT, MSG_NOSIGNAL, epoll_ctl, sendmsg
from ringplane.native.uio import IOV_MAX, IOVEC, IOVEC_SIZE

# What the epoll instance of a link watches: the edge of each arrival, and of room if the socket had none.
READABLE = select.EPOLLIN | select.EPOLLET
READABLE_OR_WRITABLE = READABLE | select.EPOLLOUT


@compiled
def send_all(link, channel):
    """Send what waits, as far as the socket has room."""
    while link.fd >= 0 and link.first >= 0:
        describe_requests(link)
        size = sendmsg(link.fd, link.message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if size == -EAGAIN:
            if link.blocked:
                return
            # And once more: room that came before this is not reported.
            wait_for_room(link, 1)
        elif size >= 0:
            count_sent(link, size)
        elif size != -EINTR:
            give_up(link, channel, BROKEN, -size)
    if link.blocked:
        wait_for_room(link, 0)


@compiled
def wait_for_room(link, blocked):
    """Have the unit `ready` called when the socket has room, or not any more."""
    if link.blocked != blocked and link.fd >= 0:
        view(link.event, EPOLL_EVENT).events = READABLE_OR_WRITABLE if blocked else READABLE
        epoll_ctl(link.epoll_fd, EPOLL_CTL_MOD, link.fd, link.event)
    link.blocked = blocked


@compiled
def describe_requests(link):
    """Make the message of the requests that wait, beginning where the last call stopped."""
    count, slot, skip = 0, link.first, link.sent
    link.described = 0
    while slot >= 0 and count < IOV_MAX:
        request = request_at(link, slot)
        if skip < REQUEST_SIZE:
            count = add_span(link, count, address_of(request) + HEADER + skip, REQUEST_SIZE - skip)
            skip = REQUEST_SIZE
        count = add_buffers(link, count, request.iov, skip - REQUEST_SIZE, request.payload + REQUEST_SIZE - skip)
        skip = 0
        slot = request.next
    view(link.message, MESSAGE).iov_count = count


@compiled
def add_span(link, count, address, size):
    """Add bytes to the message; returns how many IOVEC structs it has."""
    span = view(link.iovecs + count * IOVEC_SIZE, IOVEC)
    span.base, span.len = address, size
    link.described += size
    return count + 1


@compiled
def add_buffers(link, count, iov, skip, size):
    """Add `size` bytes of these buffers but for the first `skip`, or as many as there is room for."""
    while size > 0 and count < IOV_MAX:
        buffer = view(iov, IOVEC)
        if skip < buffer.len:
            part = min(buffer.len - skip, size)
            count = add_span(link, count, buffer.base + skip, part)
            size -= part
            skip = 0
        else:
            skip -= buffer.len
        iov += IOVEC_SIZE
    return count


@compiled
def count_sent(link, size):
    """So many bytes more were sent."""
    link.carried += size
    size += link.sent
    while link.first >= 0:
        request = request_at(link, link.first)
        whole = REQUEST_SIZE + request.payload
        if size < whole:
            break
        size -= whole
        request.state = SENT
        link.unanswered += 1
        link.first = request.next
    link.sent = size
