"""The end of a connection, for whatever reason: what was in flight is sent again on the next one, or fails."""

from __future__ import annotations

from errno import EFAULT

from ringplane.block.sources.nbd.layout import EVENTFD_SIZE, FREE, ONE, SENT, request_at
from ringplane.block.sources.nbd.nbd_requests import fail_all, put
from ringplane.compiler.jit import compiled
from ringplane.native.access import address_of
from ringplane.native.syscalls import write


@compiled
def give_up(link, channel, reason, error):
    """Use the connection no more. The control plane closes it, and makes another one."""
    link.fd = -1
    link.reason, link.reason_errno, link.losses = reason, error, 0
    link.unanswered = link.sent = link.blocked = link.start = link.end = link.direct = link.left = link.discard = 0
    link.reading = -1
    # The memory of a front end that has taken it away would be missing next time too.
    if link.patient and error != EFAULT:
        queue_again(link)
    else:
        link.failing = 1
        fail_all(link, channel)
    link.lost = 1
    write(link.lost_fd, address_of(link) + ONE, EVENTFD_SIZE)


@compiled
def queue_again(link):
    """What was sent is sent again; of what waits, a part of the first request may have been sent."""
    for slot in range(link.slots + 1):
        request = request_at(link, slot)
        if request.state == SENT:
            put(link, request)
        if request.state != FREE:
            request.losses += 1
            link.losses = max(link.losses, request.losses)
