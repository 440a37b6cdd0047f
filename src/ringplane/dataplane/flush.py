"""Flushes: each open file has one fdatasync(2) at a time, for all requests that came before it began.

Facts that this file depends on:
- When pages cannot be written, the kernel reports the error once per open file, to the first caller (fsync(2);
  errseq_t). Of two fdatasync(2) at the same time one fails, and the other, for the same pages, reports success. So
  there is one at a time for each open file. With a page cache each worker has its own open file, which its queues of
  the disk share (device/disk.py), and writes of a driver that does not flush end with an fdatasync(2), not with
  RWF_DSYNC.
- Then the kernel drops the pages, and a later fdatasync(2) succeeds ("fsyncgate"). Drives lose their caches as well
  when they fail to flush. A flush is a promise for all earlier writes, so after one that failed no other may succeed.
"""

from __future__ import annotations

from ringplane.compiler.jit import compiled
from ringplane.dataplane.state import FLUSHES, QUEUE, REQUEST, REQUEST_SIZE
from ringplane.engines.common import ENGINE, FLUSH
from ringplane.engines.dispatch import prepare_flush
from ringplane.native.access import view


@compiled
def flush(worker, queue, request):
    """Finish this request when an fdatasync(2) that begins from now on has ended."""
    flushes = view(queue.flushes, FLUSHES)
    request.operation = FLUSH
    request.next = -1
    if flushes.first < 0:
        flushes.first = request.slot
    else:
        view(worker.requests + flushes.last * REQUEST_SIZE, REQUEST).next = request.slot
    flushes.last = request.slot
    if flushes.flushing < 0:
        begin_flush(worker, flushes)


@compiled
def begin_flush(worker, flushes):
    """Begin an fdatasync(2) for all requests that wait; its slot is that of the first one."""
    flushes.flushing = flushes.first
    flushes.first = -1
    request = view(worker.requests + flushes.flushing * REQUEST_SIZE, REQUEST)
    prepare_flush(view(worker.engine, ENGINE), request.slot, view(request.queue, QUEUE).file)
