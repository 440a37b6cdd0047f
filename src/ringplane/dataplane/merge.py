"""Adjacent requests become one I/O: a request that goes on where the one fetched before it ends is joined to that.

A driver's sequential stream costs storage, and the kernel on the way there, less in large pieces. The I/O is held until
the turn's fetching is over or a request comes that does not adjoin. When it has ended each request is answered by
itself; if it ended in any other way than whole, each is sent off again alone, so that one bad sector fails one request.
"""

from __future__ import annotations

from ringplane.dataplane.state import QUEUE, REQUEST, REQUEST_SIZE
from ringplane.engines.common import ENGINE, READ, WRITE
from ringplane.engines.dispatch import prepare_io
from ringplane.native.access import copy, view
from ringplane.native.jit import compiled
from ringplane.native.syscalls import IOVEC_SIZE
from ringplane.virtio.blk import SECTOR

# The largest I/O that is made of several requests, in bytes and in IOVEC structs. With 256 KiB, 64 KiB sequential I/O
# cost 15 to 25 % less CPU time at depth 32 and 128 on a disk, up to 15 % less on a loop device; 1 MiB brought nothing
# more, and with fast storage device and driver would work by turns.
MERGE_BYTES, MERGE_IOVECS = 256 * 1024, 256


@compiled
def hold(worker, request):
    """Queue the I/O of a request that has just been fetched and needs no bounce buffer."""
    # Its slot's last request may have had one.
    request.bounce_iov_len = 0
    if worker.held >= 0:
        first = view(worker.requests + worker.held * REQUEST_SIZE, REQUEST)
        if view(worker.engine, ENGINE).merges and adjoins(first, request):
            join(worker, first, request)
            return
        send_held(worker)
    request.whole_length = request.length
    request.whole_iov_count = request.iov_count
    worker.held = worker.held_last = request.slot


@compiled
def adjoins(first, request):
    """Whether the request goes on where the I/O that `first` begins ends, and fits.

    The list of a write's buffers has no room behind it where the device is to write something (a zone append).
    """
    return (
        request.sector == first.sector + first.whole_length // SECTOR
        and request.operation == first.operation
        and request.queue == first.queue
        and first.whole_length + request.length <= MERGE_BYTES
        and first.whole_iov_count + request.iov_count <= MERGE_IOVECS
        and (first.operation == READ or first.writable_count == 0)
    )


@compiled
def join(worker, first, request):
    """Append the request's buffers to the list of the first; its own list stays as it is."""
    end = first.iov + first.whole_iov_count * IOVEC_SIZE
    copy(end, request.iov, request.iov_count * IOVEC_SIZE)
    first.whole_length += request.length
    first.whole_iov_count += request.iov_count
    view(worker.requests + worker.held_last * REQUEST_SIZE, REQUEST).joined = request.slot
    worker.held_last = request.slot


@compiled
def send_held(worker):
    """Hand the held I/O, if there is one, to the engine."""
    if worker.held < 0:
        return
    request = view(worker.requests + worker.held * REQUEST_SIZE, REQUEST)
    worker.held = -1
    queue_io(worker, request, request.iov, request.whole_iov_count)


@compiled
def queue_io(worker, request, iov, iov_count):
    """Queue an I/O with the worker's engine that starts where what the request has still to transfer does."""
    queue = view(request.queue, QUEUE)
    dsync = request.operation == WRITE and queue.dsync
    engine, offset = view(worker.engine, ENGINE), offset_in_image(request)
    prepare_io(engine, request.slot, request.operation, queue.file, iov, iov_count, offset, dsync)


@compiled
def offset_in_image(request):
    """Where what is still to be transferred begins, in bytes."""
    return request.sector * SECTOR + request.done
