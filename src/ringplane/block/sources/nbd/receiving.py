"""Receiving: replies, one after the other, as many as there are. Nothing that a server sends is trusted.

Reading ahead: a call of recvmsg(2) takes the rest of the data of a read straight into the buffers of guests, and what
comes after it into a small buffer, where the next headers are found. While reads are short, reading ahead further and
copying costs less than a call for each of them (`EAGER`, `SHORT`).

A reply to a read may have many chunks, in any order, between those of other replies. Each byte has to come once.
Instead of a map of what has come, a request has two sums over the announced bytes: their number, and (`moment`) of
2 x + 1 for byte x, which is end * end - start * start for a chunk. When the reply ends, both are those of the whole,
length and length * length. So a server that repeats one part in place of another is noticed; one that means to deceive
can send wrong data anyway.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EINVAL, EIO, ENOMEM, ENOSPC, EOPNOTSUPP, EOVERFLOW, EPERM, ESHUTDOWN

from ringplane.block.ranges import ZEROS_SIZE
from ringplane.block.sources.nbd.layout import (
    BAD_COOKIE,
    BAD_LENGTH,
    BAD_MAGIC,
    BROKEN,
    CLOSED,
    ENDLESS,
    EVENTFD_SIZE,
    EXPORT,
    ONE,
    OUT_OF_PLACE,
    REPLY,
    SENT,
    SHUT_DOWN,
    TOO_SHORT,
    UNEXPECTED_TYPE,
    request_at,
)
from ringplane.block.sources.nbd.losing import give_up
from ringplane.block.sources.nbd.nbd_requests import refuse, succeed
from ringplane.block.sources.nbd.protocol import (
    CMD_READ,
    DATA_FIELDS,
    ERROR_FIELDS,
    ERROR_TYPE,
    HOLE_FIELDS,
    LONGEST_STRING,
    REPLY_FLAG_DONE,
    SIMPLE_MAGIC,
    SIMPLE_SIZE,
    STRUCTURED_MAGIC,
    STRUCTURED_SIZE,
    TYPE_NONE,
    TYPE_OFFSET_DATA,
    TYPE_OFFSET_HOLE,
)
from ringplane.block.sources.nbd.sending import add_buffers, add_span
from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of, copy, load64, view
from ringplane.native.byte_order import load16_be, load32_be, load64_be
from ringplane.native.sockets import MESSAGE
from ringplane.native.syscalls import MSG_DONTWAIT, recvmsg, write
from ringplane.native.uio import IOV_MAX, IOVEC, IOVEC_SIZE

# Bytes to read ahead: while the last read was shorter than LONG, and otherwise. The largest start of a reply that is
# handled as a whole is that of a hole.
EAGER, SHORT, LONG = 32 << 10, 64, 16 << 10
LONGEST_START = STRUCTURED_SIZE + HOLE_FIELDS
AHEAD_SIZE = EAGER + LONGEST_START

# Calls of recvmsg in a turn of the loop: a server may send as fast as we receive, and other disks have their turn too.
MOST_CALLS = 32

# Error chunks of one reply: one for each block of 512 bytes, if a read is as long as it can be.
MOST_ERRORS = 1 << 16

# Bits; others are EOVERFLOW and EOPNOTSUPP.
KNOWN_ERRORS = 1 << EPERM | 1 << EIO | 1 << ENOMEM | 1 << EINVAL | 1 << ENOSPC


@compiled
def receive_all(link, channel):
    """Handle what the server has sent, until there is no more, or leave the rest for the next turn (`obey`)."""
    calls = 0
    while link.fd >= 0:
        if calls == MOST_CALLS:
            write(link.wake_fd, address_of(link) + ONE, EVENTFD_SIZE)
            return
        calls += 1
        describe_room(link)
        size = recvmsg(link.fd, link.message, MSG_DONTWAIT)
        if size == -EAGAIN:
            return
        if size > 0:
            take(link, channel, size)
            if size < link.described and link.unanswered == 0:
                # A later arrival is another edge; but if the end came with the last bytes, only another call shows it.
                return
        elif size == 0:
            give_up(link, channel, CLOSED, 0)
        elif size != -EINTR:
            give_up(link, channel, BROKEN, -size)


@compiled
def describe_room(link):
    """Make the message of the buffers that wait for data, and of room to read ahead."""
    count = link.described = 0
    if link.left > 0:
        request = request_at(link, link.reading)
        count = add_buffers(link, 0, request.at, request.skip, link.left)
    link.direct = link.described
    if link.direct == link.left and count < IOV_MAX:
        count = add_span(link, count, link.ahead + link.end, link.eager)
    view(link.message, MESSAGE).iov_count = count


@compiled
def take(link, channel, size):
    """So many bytes have arrived where `describe_room` said."""
    link.carried += size
    direct = min(size, link.direct)
    if direct > 0:
        deliver(request_at(link, link.reading), 0, direct)
        link.left -= direct
    link.end += size - direct
    while link.fd >= 0 and handle(link, channel):
        pass
    if link.start > 0:
        copy(link.ahead, link.ahead + link.start, link.end - link.start)
        link.end -= link.start
        link.start = 0


@compiled
def deliver(request, source, size):
    """The bytes of a read at its `position` are those at `source`; 0: they are in its buffers already."""
    request.position += size
    while size > 0:
        buffer = view(request.at, IOVEC)
        part = min(size, buffer.len - request.skip)
        if source:
            copy(buffer.base + request.skip, source, part)
            source += part
        size -= part
        request.skip += part
        if request.skip == buffer.len:
            request.skip = 0
            request.at += IOVEC_SIZE


@compiled
def handle(link, channel):
    """Handle the next piece of what was read ahead; False: more has to arrive first."""
    if link.reading < 0:
        return start_reply(link, channel, link.end - link.start)
    if link.discard > 0:
        part = min(link.end - link.start, link.discard)
        link.discard -= part
        link.start += part
    elif link.left > 0:
        part = min(link.end - link.start, link.left)
        deliver(request_at(link, link.reading), link.ahead + link.start, part)
        link.left -= part
        link.start += part
    if link.left > 0 or link.discard > 0:
        return False
    end_piece(link, channel)
    return True


@compiled
def start_reply(link, channel, available):
    """Handle the start of a reply, if it is there as a whole."""
    if available < SIMPLE_SIZE:
        return False
    reply = address_of(link) + REPLY
    copy(reply, link.ahead + link.start, min(available, LONGEST_START))
    magic = load32_be(reply)
    if magic == SIMPLE_MAGIC:
        link.start += SIMPLE_SIZE
        return start_simple(link, channel, reply, find(link, load64(reply + 8)))
    if magic == STRUCTURED_MAGIC and link.structured:
        return start_chunk(link, channel, reply, available)
    return wrong(link, channel, BAD_MAGIC)


@compiled
def wrong(link, channel, reason):
    give_up(link, channel, reason, 0)
    return False


@compiled
def find(link, cookie):
    """The slot of the request that was sent with this cookie, -1 if there is none."""
    slot = cookie & 0xFFFF_FFFF
    if slot > link.slots:
        return -1
    request = request_at(link, slot)
    return slot if request.state == SENT and request.cookie == cookie else -1


@compiled
def start_simple(link, channel, reply, slot):
    if slot < 0:
        return wrong(link, channel, BAD_COOKIE)
    request, error = request_at(link, slot), load32_be(reply + 4)
    if request.command == CMD_READ and link.structured:
        return wrong(link, channel, UNEXPECTED_TYPE)
    if error:
        return end_with(link, channel, request, error)
    if request.command == CMD_READ:
        announce(request, 0, request.length)
        start_data(link, slot, request.length, 1)
    else:
        succeed(link, channel, request)
    return True


@compiled
def start_data(link, slot, size, done):
    """So many announced bytes of this read come next."""
    link.reading, link.left, link.done = slot, size, done
    link.eager = SHORT if size >= LONG else EAGER


@compiled
def end_with(link, channel, request, error):
    """The server has failed a request. One that shuts down is asked no more; another one may do it."""
    if error == ESHUTDOWN:
        return wrong(link, channel, SHUT_DOWN)
    refuse(link, channel, request, errno_of(error))
    return True


@compiled
def errno_of(error):
    """The protocol has the numbers of Linux for these, and others are not allowed."""
    if error == EOVERFLOW:
        return error
    known = error == EOPNOTSUPP or (error <= ENOSPC and (KNOWN_ERRORS >> error) & 1)
    return error if known else EIO


@compiled
def start_chunk(link, channel, reply, available):
    if available < STRUCTURED_SIZE:
        return False
    kind, length = load16_be(reply + 6), load32_be(reply + 16)
    fields = size_of_fields(kind)
    if fields < 0:
        return wrong(link, channel, UNEXPECTED_TYPE)
    if length < fields:
        return wrong(link, channel, BAD_LENGTH)
    if available < STRUCTURED_SIZE + fields:
        return False
    slot = find(link, load64(reply + 8))
    if slot < 0:
        return wrong(link, channel, BAD_COOKIE)
    link.start += STRUCTURED_SIZE + fields
    link.reading, link.done = slot, load16_be(reply + 4) & REPLY_FLAG_DONE
    return take_chunk(link, channel, reply, request_at(link, slot), kind, length - fields)


@compiled
def size_of_fields(kind):
    """How many bytes come before data or a message; -1: an unknown type."""
    if kind == TYPE_OFFSET_DATA:
        return DATA_FIELDS
    if kind == TYPE_OFFSET_HOLE:
        return HOLE_FIELDS
    if kind == TYPE_NONE:
        return 0
    return ERROR_FIELDS if kind & ERROR_TYPE else -1


@compiled
def take_chunk(link, channel, reply, request, kind, size):
    """Handle a chunk; `size` bytes come after its fields."""
    if kind & ERROR_TYPE:
        return take_error(link, channel, reply, request, size)
    if kind == TYPE_NONE:
        if size or not link.done:
            return wrong(link, channel, BAD_LENGTH)
        return True
    hole = load32_be(reply + 28) if kind == TYPE_OFFSET_HOLE else 0
    if request.command != CMD_READ:
        return wrong(link, channel, UNEXPECTED_TYPE)
    if (size == 0) == (hole == 0):
        return wrong(link, channel, BAD_LENGTH)
    start = load64_be(reply + 20) - request.offset
    if not is_missing(request, start, size + hole):
        return wrong(link, channel, OUT_OF_PLACE)
    announce(request, start, size + hole)
    if hole:
        deliver_zeros(view(link.export, EXPORT), request, hole)
    else:
        start_data(link, request.slot, size, link.done)
    return True


@compiled
def take_error(link, channel, reply, request, size):
    error = load32_be(reply + 20)
    if error == 0 or size > LONGEST_STRING + DATA_FIELDS:
        return wrong(link, channel, BAD_LENGTH)
    if request.error == 0:
        request.error = error
    request.errors += 1
    if request.errors > MOST_ERRORS:
        return wrong(link, channel, ENDLESS)
    link.discard = size
    return True


@compiled
def is_missing(request, start, size):
    """Whether these bytes are a part of a read of which so many have not been announced yet."""
    return 0 <= start <= request.length - size and size <= request.length - request.announced


@compiled
def announce(request, start, size):
    """The next bytes of a read that come are those from `start` on."""
    request.announced += size
    request.moment += size * (2 * start + size)
    if request.position != start:
        seek(request, start)


@compiled
def seek(request, position):
    """Find the buffer of this byte."""
    request.at, request.skip, request.position = request.iov, position, position
    while request.skip >= view(request.at, IOVEC).len:
        request.skip -= view(request.at, IOVEC).len
        request.at += IOVEC_SIZE


@compiled
def deliver_zeros(export, request, size):
    while size > 0:
        part = min(size, ZEROS_SIZE)
        deliver(request, export.zeros, part)
        size -= part


@compiled
def end_piece(link, channel):
    """A reply or chunk has arrived as a whole."""
    request = request_at(link, link.reading)
    link.reading = -1
    if not link.done:
        return
    if request.error:
        end_with(link, channel, request, request.error)
    elif request.command == CMD_READ and request.announced < request.length:
        wrong(link, channel, TOO_SHORT)
    elif request.command == CMD_READ and request.moment != request.length * request.length:
        wrong(link, channel, OUT_OF_PLACE)
    else:
        succeed(link, channel, request)
