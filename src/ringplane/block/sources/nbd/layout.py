"""The structs of the source `nbd`.

An I/O has one request in flight at a time, which has the slot of the I/O: a cookie is the number of the slot and how
many requests there were before. One more slot, the last, is for a flush of the control plane.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.native.access import view
from ringplane.native.structs import struct

# Of a disk: what its server can do. All links share it.
EXPORT = struct(
    "flags",  # transmission flags
    "largest",  # bytes of the largest payload
    "zeros",  # address of ZEROS_SIZE zero bytes
    "flush_failed",  # the server has failed a flush: earlier writes may be lost
)

# The states of a request: there is none; it waits to be sent; it is with the server.
FREE, QUEUED, SENT = range(3)

REQUEST = struct(
    "slot",
    "state",
    "next = -1",  # slot of the next one that waits to be sent
    "io",  # the address of its BLOCK_IO, 0 for that of the control plane
    # What is sent: 28 bytes, and the payload of a write.
    "header",
    "cookie",
    "header_offset",
    "header_length",
    "command",
    "offset",
    "length",
    "iov",  # the data of a read or write
    "payload",  # how many bytes of it are sent
    # The data of a read: which part of it was announced (receiving.py), and where its byte `position` goes.
    "announced",
    "moment",
    "position",
    "at",
    "skip",
    "error",  # errno, of a chunk that is not the last
    "errors",  # how many such chunks there were
    "losses",  # how many connections were lost since it was made
    # The I/O
    "result",  # of the I/O when the server has done everything
    "range",  # of a discard and the like: which range the request is for, and how much of that was done before
    "within",
    "flushing",  # the request is the flush after a write that must be stable
    "writing_zeros",  # the server has failed to make the zeros of this I/O: they are written
    "began",  # nanoseconds, CLOCK_MONOTONIC: when it was queued first
    "zeros_iov_base",  # one IOVEC for zeros that are written
    "zeros_iov_len",
)
REQUEST_SIZE = REQUEST.itemsize
HEADER: int = REQUEST.fields["header"][1]  # type: ignore[index]
ZEROS_IOV: int = REQUEST.fields["zeros_iov_base"][1]  # type: ignore[index]

# Why a connection was given up.
(
    CLOSED,
    BROKEN,
    BAD_MAGIC,
    BAD_COOKIE,
    UNEXPECTED_TYPE,
    BAD_LENGTH,
    OUT_OF_PLACE,
    TOO_SHORT,
    SHUT_DOWN,
    ENDLESS,
) = range(1, 11)

LINK = struct(
    "export",  # EXPORT
    "requests",  # REQUEST structs
    "slots",  # how many there are for I/Os; that of the control plane comes after them
    "generation",  # counts requests
    "times",  # SERVICE_TIME structs (service.py)
    "now",  # nanoseconds, CLOCK_MONOTONIC: when the I/O thread began what it does with the link
    "fd = -1",  # the connection; -1: there is none
    "structured",  # whether replies may be chunks
    "patient",  # whether requests wait for another connection
    "failing",  # without a connection: they do not wait any more
    "reason",  # why the last connection was given up, and the errno
    "reason_errno",
    "losses",  # the most `losses` of a request then
    "lost",  # set by the I/O thread when a connection was given up, cleared by the control plane
    "lost_fd",  # the eventfd that signals the control plane
    "wake_fd",  # the eventfd by which the control plane asks for what follows
    "new_fd = -1",  # use this connection
    "new_structured",
    "expired",  # do not wait any more
    "sync_wanted",  # flush
    "sync_result",  # 0 or -errno
    "sync_fd",  # the eventfd that says that there is a result
    # Requests that wait to be sent (sending.py).
    "first = -1",
    "last",
    "unanswered",  # how many requests the server has
    "sent",  # bytes of the first one that were sent
    "blocked",  # the socket has no room
    "epoll_fd",  # with the socket in it
    "event",  # EPOLL_EVENT
    "message",  # MESSAGE, whose buffers are these IOVEC structs
    "iovecs",
    "described",  # bytes that they describe
    # What was received and not handled yet (receiving.py).
    "ahead",
    "start",
    "end",
    "eager",  # how much to read ahead
    "direct",  # bytes that the present call reads into the buffers of a read
    "reading = -1",  # slot of the request whose reply is being received
    "left",  # bytes of data that are still to come
    "discard",  # bytes that are still to come and are ignored
    "done",  # the request has ended then
    "reply0",  # the start of a reply, aligned
    "reply1",
    "reply2",
    "reply3",
    "gap",  # MODERATION
    "at",
    "carried",  # bytes of replies and of what was written, since then
    "one = 1",  # what is written to eventfds
)
ONE: int = LINK.fields["one"][1]  # type: ignore[index]
EVENTFD_SIZE = 8
MODERATION_FIELD: int = LINK.fields["gap"][1]  # type: ignore[index]
REPLY: int = LINK.fields["reply0"][1]  # type: ignore[index]


@compiled
def request_at(link, slot):
    return view(link.requests + slot * REQUEST_SIZE, REQUEST)
