"""Flushes: each queue has one fdatasync(2) at a time, for all requests that came before it began.

Facts that this file depends on:
- When pages cannot be written, the kernel reports the error once per open file, to the first caller (fsync(2);
  errseq_t). Of two fdatasync(2) at the same time one fails, and the other, for the same pages, reports success. So
  there is one at a time for each open file, and where there is a page cache each queue has its own open file (disk.py).
  For the same reason writes of a driver that does not flush end with an fdatasync(2), not with RWF_DSYNC.
- Then the kernel drops the pages, and a later fdatasync(2) succeeds ("fsyncgate"). Drives lose their caches as well
  when they fail to flush. A flush is a promise for all earlier writes, so after one that failed no other may succeed.
"""

from __future__ import annotations

from ringplane.dataplane.state import REQUEST, REQUEST_SIZE
from ringplane.engines.common import ENGINE, FLUSH
from ringplane.engines.dispatch import prepare_flush
from ringplane.native.access import view
from ringplane.native.jit import compiled


@compiled
def flush(worker, queue, request):
    """Finish this request when an fdatasync(2) that begins from now on has ended."""
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
    """Begin an fdatasync(2) for all requests that wait; its slot is that of the first one."""
    queue.flushing = queue.flush_first
    queue.flush_first = -1
    prepare_flush(view(worker.engine, ENGINE), queue.flushing, queue.file)
