"""The units of the source `nbd`: what the I/O thread calls."""

from __future__ import annotations

from errno import EIO

from ringplane.block.io import CHANNEL, io_at
from ringplane.block.sources.moderation import MODERATION, moderate
from ringplane.block.sources.nbd.layout import EVENTFD_SIZE, LINK, MODERATION_FIELD, REPLY
from ringplane.block.sources.nbd.nbd_requests import begin, begin_sync, fail_all
from ringplane.block.sources.nbd.receiving import receive_all
from ringplane.block.sources.nbd.sending import send_all
from ringplane.block.stack import STACK
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import unit
from ringplane.engines.common import complete
from ringplane.native.access import address_of, view
from ringplane.native.syscalls import monotonic_ns, read


@unit
def submit(stack_address, channel_address, first):
    """Begin the I/Os of a turn, a list that begins with slot `first`, and send their requests together."""
    link = view(view(stack_address, STACK).source, LINK)
    channel = view(channel_address, CHANNEL)
    link.now = monotonic_ns()
    slot = first
    while slot >= 0:
        io = io_at(channel, slot)
        slot = io.next
        if link.failing:
            complete(channel.engine, io.slot, -EIO)
        else:
            begin(link, channel, io)
    if not link.blocked:
        send_all(link, channel)
    return 0


@unit
def ready(link_address, channel_address):
    """The server has sent something, has closed the connection, or there is room for requests."""
    link, channel = view(link_address, LINK), view(channel_address, CHANNEL)
    link.now = monotonic_ns()
    unanswered = link.unanswered
    receive_all(link, channel)
    if channel_address:
        take_together(link, channel, unanswered - link.unanswered)
    begin_sync(link)
    send_all(link, channel)
    return 0


@compiled
def take_together(link, channel, came):
    """So many replies have come: ask for a pause in which more can come."""
    moderation = view(address_of(link) + MODERATION_FIELD, MODERATION)
    moderate(channel, moderation, link.now, came, link.unanswered, link.carried // max(came, 1))
    link.carried = 0


@unit
def obey(link_address, channel_address):
    """The control plane asks for something, or `receive_all` has left something for the next turn."""
    link, channel = view(link_address, LINK), view(channel_address, CHANNEL)
    link.now = monotonic_ns()
    read(link.wake_fd, link_address + REPLY, EVENTFD_SIZE)
    if link.new_fd >= 0:
        link.fd, link.structured = link.new_fd, link.new_structured
        link.new_fd = -1
        link.failing = 0
    elif link.expired and link.fd < 0:
        # Only here: the control plane may store it at any time, and wakes this thread then.
        link.expired = 0
        link.failing = 1
        fail_all(link, channel)
    # What came before is an edge that was not for this connection; or there was too much for one turn.
    receive_all(link, channel)
    begin_sync(link)
    send_all(link, channel)
    return 0


UNITS = (submit, ready, obey)
