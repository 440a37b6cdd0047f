"""From the block I/O back to the ring: write each request's status, publish used elements, notify.

The used elements of a turn of the loop are published together, and each driver is notified once for all of them.
"""

from __future__ import annotations

from ringplane.block.io import DISCARD, READ, REFUSED, ZONE_REPORT, io_at
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call, unit
from ringplane.dataplane.io_time import TICK_BITS
from ringplane.dataplane.signaller import signal
from ringplane.dataplane.state import (
    COALESCE,
    COUNTER,
    COUNTER_HISTOGRAM,
    COUNTER_SIZE,
    QUEUE,
    REQUEST,
    REQUEST_SIZE,
    WORKER_ONE,
)
from ringplane.dataplane.tracer import TRACER
from ringplane.inflight import tracking
from ringplane.metrics.histogram import count
from ringplane.native.access import address_of, store8, view
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK
from ringplane.virtio.ring import publish_used, put_used, wants_notification

# In nanoseconds: how long COALESCE holds notifications back after the last completion, and after the first one of them.
COALESCE_NS, COALESCE_MAX_NS = 50_000, 400_000


@compiled
def answer_all(worker, channel):
    """Complete the requests whose block I/Os have ended."""
    while channel.ended_first >= 0:
        io = io_at(channel, channel.ended_first)
        channel.ended_first = io.next
        answer(worker, view(worker.requests + io.slot * REQUEST_SIZE, REQUEST), io)


@compiled
def answer(worker, request, io):
    queue = view(request.queue, QUEUE)
    request.done = io.done
    if io.operation == READ or io.operation == ZONE_REPORT:
        request.written = io.done
    status = status_of(worker, queue, request, io)
    if request.end:
        status = call(request.end, address_of(queue), address_of(request), address_of(io), status)
    answer_with(worker, queue, request, status)


@compiled
def status_of(worker, queue, request, io):
    """The virtio status for the result of the block I/O. Errors of storage are recorded for the log."""
    if io.result >= 0:
        return VIRTIO_BLK_S_OK
    if io.result <= REFUSED:
        return REFUSED - io.result
    call(worker.record_failure, address_of(worker), address_of(queue), address_of(request), address_of(io))
    # Discard is advice, after which the content is undefined: a driver could do nothing about an error, and loses
    # nothing. This includes errors of the medium: they are found when the range is read or written.
    return VIRTIO_BLK_S_OK if io.operation == DISCARD else VIRTIO_BLK_S_IOERR


@compiled
def answer_with(worker, queue, request, status):
    """Write the status byte, count, and use the chain (with IN_ORDER: as soon as all older ones are used)."""
    store8(request.status_address, status)
    account(worker, queue, request, status)
    if queue.log:
        call(worker.mark_request, address_of(queue), address_of(request))
    if worker.trace:
        tracer = view(worker.trace, TRACER)
        call(tracer.completed, address_of(worker), address_of(queue), address_of(request), status)
    if queue.in_order:
        request.ended = 1
        use_in_order(worker, queue)
    else:
        use(worker, queue, request)


@compiled
def use(worker, queue, request):
    """Put the chain into the used ring; the driver sees it after `publish_all`."""
    length = used_length(request)
    if queue.inflight:
        entry = request.entry if queue.packed else request.head
        tracking.use(queue, entry, request.head, request.descriptors, length)
        if queue.packed:
            # One at a time. In a batch all used descriptors but the first look used before the batch is published, and
            # the driver would still see them as used if the next process published another batch there.
            call(worker.publish_tracked, address_of(queue))
    else:
        put_used(queue, request.head, request.descriptors, length)
    mark_unpublished(worker, queue)
    release(worker, queue, request)


# VIRTIO_F_IN_ORDER (section 2.7.9): chains are used in the order in which they became available, whichever ends first.


@compiled
def queue_up(worker, queue, request):
    """Append the request to the list of those that wait to be used in order."""
    request.following = -1
    request.ended = 0
    if queue.oldest < 0:
        queue.oldest = request.slot
    else:
        view(worker.requests + queue.newest * REQUEST_SIZE, REQUEST).following = request.slot
    queue.newest = request.slot


@compiled
def use_in_order(worker, queue):
    """Use the chains at the front of the list whose requests have ended."""
    while queue.oldest >= 0:
        request = view(worker.requests + queue.oldest * REQUEST_SIZE, REQUEST)
        if not request.ended:
            return
        queue.oldest = request.following
        use(worker, queue, request)


@compiled
def used_length(request):
    """How many bytes were written without a gap from the start of the device-writable part (section 2.7.8.2).

    The status is the last writable byte: it counts only if all bytes before it were written too.
    """
    return request.written + 1 if request.written == request.writable_bytes else request.written


@compiled
def account(worker, queue, request, status):
    counter = view(queue.counters + request.kind * COUNTER_SIZE, COUNTER)
    counter.requests += 1
    counter.bytes += request.done
    if status != VIRTIO_BLK_S_OK:
        counter.errors += 1
    lasted = worker.now - request.started
    counter.nanoseconds += lasted
    count(address_of(counter) + COUNTER_HISTOGRAM, lasted)


@compiled
def release(worker, queue, request):
    """Free the slot, and return to Python if it waits for this: to finish a drain or drop a replaced memory table."""
    request.queue = 0
    request.next = worker.free
    worker.free = request.slot
    queue.in_flight -= 1
    worker.in_flight -= 1
    worker.completed += 1
    if request.retired_memory or (queue.draining and queue.in_flight == 0):
        request.retired_memory = 0
        worker.attention = 1


@compiled
def mark_unpublished(worker, queue):
    if not queue.unpublished:
        queue.unpublished = 1
        queue.next_unpublished = worker.unpublished
        worker.unpublished = address_of(queue)


# Notifications: in a guest each one is an interrupt, which costs it more than a request does, and a guest that is busy
# submitting gains nothing from it. So the policy COALESCE holds notifications back until nothing has completed for a
# while, then makes one for all.


@compiled
def publish_all(worker):
    """Publish the used elements of this turn, and notify the drivers unless notifications are held back."""
    if worker.unpublished and worker.policy == COALESCE:
        if not worker.unnotified:
            worker.notify_limit = worker.now + COALESCE_MAX_NS
        worker.notify_at = min(worker.now + COALESCE_NS, worker.notify_limit)
    tick = worker.now >> TICK_BITS
    while worker.unpublished:
        queue = view(worker.unpublished, QUEUE)
        worker.unpublished = queue.next_unpublished
        if queue.tick != tick:
            call(worker.begin_tick, address_of(queue), tick, 1)
        # Last, because until then others count it as busy (io_time.py).
        queue.unpublished = 0
        if queue.inflight:
            call(worker.publish_tracked, address_of(queue))
        else:
            publish_used(queue)
        if queue.log:
            call(worker.mark_ring, address_of(queue))
        if not queue.unnotified:
            queue.unnotified = 1
            queue.next_unnotified = worker.unnotified
            worker.unnotified = address_of(queue)
    if worker.policy != COALESCE or worker.now >= worker.notify_at:
        notify_all(worker)


@unit
def publish_tracked(queue_address):
    """Publish the used elements of a ring with an in-flight region, whose stores must have a safe order.

    A unit, because only some front ends want it. Split rings call it once for all used elements of a turn.
    """
    tracking.publish(view(queue_address, QUEUE))
    return 0


@compiled
def notify_all(worker):
    """Notify each driver that wants it, once for all that was published."""
    while worker.unnotified:
        queue = view(worker.unnotified, QUEUE)
        worker.unnotified = queue.next_unnotified
        queue.unnotified = 0
        if wants_notification(queue) and queue.call_fd >= 0:
            # The result does not matter: a full eventfd or pipe has a notification in it already.
            signal(worker.signaller, queue.call_fd, address_of(worker) + WORKER_ONE)
