"""From the engine back to the ring: continue or finish each request, write its status, publish used elements, notify.

The used elements of a turn of the loop are published together, and each driver is notified once for all of them.
"""

from __future__ import annotations

from errno import EINTR, EOPNOTSUPP

from ringplane.compiler.jit import compiled
from ringplane.dataplane import dirty
from ringplane.dataplane.execute import give_bounce, transfer
from ringplane.dataplane.failures import record_failure
from ringplane.dataplane.fetch import consume, copy_to_front
from ringplane.dataplane.flush import begin_flush, flush
from ringplane.dataplane.helper_threads import send_to_helpers
from ringplane.dataplane.signaller import signal
from ringplane.dataplane.state import (
    COALESCE,
    COUNTER,
    COUNTER_HISTOGRAM,
    COUNTER_SIZE,
    DEVICE,
    FLUSHES,
    QUEUE,
    REQUEST,
    REQUEST_SIZE,
    TRACE_COMPLETE,
    WORKER_ONE,
)
from ringplane.dataplane.trace import trace
from ringplane.dataplane.zones import end_reset, end_write, record_reached
from ringplane.engines.common import (
    COMPLETION,
    COMPLETION_SIZE,
    DISCARD,
    ENGINE,
    FLUSH,
    READ,
    RESET_ZONES,
    SECURE_ERASE,
    SYNC_ZONES,
    WRITE,
)
from ringplane.engines.dispatch import reap
from ringplane.inflight import tracking
from ringplane.metrics.histogram import count
from ringplane.native.access import address_of, store8, view
from ringplane.native.syscalls import monotonic_ns
from ringplane.virtio.blk import VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK
from ringplane.virtio.ring import publish_used, put_used, wants_notification
from ringplane.virtio.zoned import APPEND_SECTOR_SIZE, VIRTIO_BLK_T_ZONE_APPEND

# In nanoseconds: how long COALESCE holds notifications back after the last completion, and after the first one of them.
COALESCE_NS, COALESCE_MAX_NS = 50_000, 400_000


@compiled
def complete_all(worker):
    """Reap the engine's completions and continue each request that they belong to."""
    engine = view(worker.engine, ENGINE)
    completions = reap(engine)
    if completions == 0:
        return
    worker.now = monotonic_ns()
    for index in range(completions):
        completion = view(engine.completions + index * COMPLETION_SIZE, COMPLETION)
        request = view(worker.requests + completion.slot * REQUEST_SIZE, REQUEST)
        if request.joined < 0:
            progress(worker, request, completion.result)
        else:
            progress_each(worker, request, completion.result)


@compiled
def progress_each(worker, request, result):
    """A merged I/O has ended: if it was not transferred whole, for whatever reason, each request is retried alone."""
    whole = result == request.whole_length
    slot = request.slot
    while slot >= 0:
        request = view(worker.requests + slot * REQUEST_SIZE, REQUEST)
        slot = request.joined
        request.joined = -1
        if whole:
            progress(worker, request, request.length)
        else:
            transfer(worker, request)


@compiled
def progress(worker, request, result):
    """An I/O of this request ended with `result` bytes or -errno: continue it if it was short, else finish it."""
    queue = view(request.queue, QUEUE)
    if request.operation >= FLUSH:
        end_whole(worker, queue, request, result)
        return
    if result == -EINTR:
        transfer(worker, request)
        return
    if result <= 0:
        if result == -EOPNOTSUPP and request.dsync and request.operation == WRITE:
            # Storage without RWF_DSYNC: from now on a flush follows each write of this queue.
            queue.dsync, queue.flush_writes, request.dsync = 0, 1, 0
            transfer(worker, request)
            return
        # 0: nothing was transferred, although something was asked for: the image has become shorter.
        record_failure(worker, queue, request, result)
        finish(worker, queue, request, VIRTIO_BLK_S_IOERR)
        return
    if request.bounce_iov_len > 0 and request.operation == READ:
        copy_to_front(request, request.bounce, result)
    request.done += result
    if request.done < request.length:
        consume(request, result)
        transfer(worker, request)
    elif request.zone:
        end_zone_data(worker, queue, request)
    elif queue.flush_writes and request.operation == WRITE:
        flush(worker, queue, request)
    else:
        finish(worker, queue, request, VIRTIO_BLK_S_OK)


@compiled
def end_whole(worker, queue, request, result):
    """An operation without partial results has ended: a flush, or the work of a helper thread."""
    if request.operation == FLUSH:
        end_flush(worker, queue, result)
        return
    if request.operation == RESET_ZONES:
        end_reset(queue, request)
    if result < 0:
        record_failure(worker, queue, request, result)
        if request.operation == SYNC_ZONES:
            view(queue.device, DEVICE).flush_failed = 1
    elif queue.flush_ranges and request.operation <= SECURE_ERASE:
        flush(worker, queue, request)
        return
    request.done = request.length if result >= 0 else 0
    # Discard is advice, after which the content is undefined: a driver could do nothing about an error, and loses
    # nothing. This includes errors of the medium: they are found when the range is read or written.
    done = result >= 0 or request.operation == DISCARD
    finish(worker, queue, request, VIRTIO_BLK_S_OK if done else VIRTIO_BLK_S_IOERR)


@compiled
def end_flush(worker, queue, result):
    """An fdatasync(2) has ended: finish all requests that it was for, and begin one for those that came meanwhile."""
    device = view(queue.device, DEVICE)
    flushes = view(queue.flushes, FLUSHES)
    slot, flushes.flushing = flushes.flushing, -1
    if result < 0:
        device.flush_failed = 1
    status = VIRTIO_BLK_S_IOERR if device.flush_failed else VIRTIO_BLK_S_OK
    while slot >= 0:
        request = view(worker.requests + slot * REQUEST_SIZE, REQUEST)
        slot = request.next
        request.done = request.length if status == VIRTIO_BLK_S_OK else 0
        # The queues of an open file share its flushes: this request may be of another queue than the first one.
        asking = view(request.queue, QUEUE)
        if result < 0:
            record_failure(worker, asking, request, result)
        finish(worker, asking, request, status)
    if flushes.first >= 0:
        begin_flush(worker, flushes)


@compiled
def end_zone_data(worker, queue, request):
    """The data of a write to a zone is written. With write-through its write pointer has to be stable too."""
    record_reached(queue, request)
    if queue.write_through:
        request.operation = SYNC_ZONES
        send_to_helpers(worker, request)
    else:
        finish(worker, queue, request, VIRTIO_BLK_S_OK)


@compiled
def finish(worker, queue, request, status):
    """Write the status byte, count, and use the chain (with IN_ORDER: as soon as all older ones are used)."""
    store8(request.status_address, status)
    account(worker, queue, request, status)
    if request.zone:
        end_write(queue, request, status)
    if queue.log:
        dirty.mark_request(queue, request)
    if worker.trace:
        trace(worker, TRACE_COMPLETE, queue, request, status, worker.now - request.started)
    give_bounce(worker, request)
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
    written = request.done if request.operation == READ else append_length(request)
    return written + 1 if written == request.writable_bytes else written


@compiled
def append_length(request):
    """The append_sector field counts as written only if all data of the zone append was written."""
    appended = request.type == VIRTIO_BLK_T_ZONE_APPEND and request.done > 0 and request.done == request.length
    return APPEND_SECTOR_SIZE if appended else 0


@compiled
def account(worker, queue, request, status):
    counter = view(queue.counters + request.kind * COUNTER_SIZE, COUNTER)
    counter.requests += 1
    counter.bytes += request.done
    if status != VIRTIO_BLK_S_OK:
        counter.errors += 1
    count(address_of(counter) + COUNTER_HISTOGRAM, worker.now - request.started)


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
    while worker.unpublished:
        queue = view(worker.unpublished, QUEUE)
        worker.unpublished = queue.next_unpublished
        queue.unpublished = 0
        if queue.inflight:
            tracking.publish(queue)
        else:
            publish_used(queue)
        if queue.log:
            dirty.mark_ring(queue)
        if not queue.unnotified:
            queue.unnotified = 1
            queue.next_unnotified = worker.unnotified
            worker.unnotified = address_of(queue)
    if worker.policy != COALESCE or worker.now >= worker.notify_at:
        notify_all(worker)


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
