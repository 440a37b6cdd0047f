"""Flushes: each queue has one fdatasync(2) at a time, which is for all requests that came before it began.

Facts that this file depends on:
- When pages cannot be written the kernel tells each open file once, and whoever asks first (fsync(2); errseq_t). Of two
  fdatasync(2) at a time one fails, and the other, which was asked for the same pages, is told that all is well. So
  there is one at a time for each open file, and where there is a page cache each queue has an open file of its own
  (disk.py). For the same reason writes of a driver that does not flush end with one of these, not with RWF_DSYNC.
- Then it forgets the pages, and a later fdatasync(2) succeeds ("fsyncgate"). Drives lose what they had cached as well
  when they fail to flush. A flush promises all that was written before, so after one that failed no other can.
"""

from __future__ import annotations

from ringplane.dataplane.state import REQUEST, REQUEST_SIZE
from ringplane.engines.common import ENGINE, FLUSH
from ringplane.engines.dispatch import prepare_flush
from ringplane.native.access import view
from ringplane.native.jit import compiled


@compiled
def flush(worker, queue, request):
    """Have this request end when an fdatasync(2) that begins from now on does."""
    request.operation = FLUSH
    request.next = -1
    if queue.flush_first < 0:
        queue.flush_first = request.slot
    else:
        view(worker.requests + queue.flush_last * REQUEST_SIZE, REQUEST).next = request.slot
    queue.flush_last = request.slot
    if queue.flushing < 0:
        begin_flush(worker, queue)


@compiled
def begin_flush(worker, queue):
    """For all that wait; it is known by the first of them."""
    queue.flushing = queue.flush_first
    queue.flush_first = -1
    prepare_flush(view(worker.engine, ENGINE), queue.flushing, queue.file)
