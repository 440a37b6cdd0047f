"""Flushes: each open file has one fdatasync(2) at a time, for all I/Os that came before it began.

Facts that this file depends on:
- When pages cannot be written, the kernel reports the error once per open file, to the first caller (fsync(2);
  errseq_t). Of two fdatasync(2) at the same time one fails, and the other, for the same pages, reports success. So
  there is one at a time for each open file. With a page cache each I/O thread has its own open file, and writes of a
  driver that does not flush end with an fdatasync(2), not with RWF_DSYNC.
- Then the kernel drops the pages, and a later fdatasync(2) succeeds ("fsyncgate"). Drives lose their caches as well
  when they fail to flush. A flush is a promise for all earlier writes, so after one that failed no other may succeed.
"""

from __future__ import annotations

from ringplane.block.io import SYNC, io_at, put
from ringplane.block.sources.file import FLUSHES
from ringplane.compiler.jit import compiled
from ringplane.engines.common import ENGINE
from ringplane.engines.dispatch import prepare_flush
from ringplane.native.access import address_of, view


@compiled
def flush(channel, file, io):
    """Finish this I/O when an fdatasync(2) that begins from now on has ended."""
    put(channel, address_of(file) + FLUSHES, io)
    if file.flushing < 0:
        begin_flush(channel, file)


@compiled
def begin_flush(channel, file):
    """Begin an fdatasync(2) for all I/Os that wait; its slot is that of the first one."""
    file.flushing = file.first
    file.first = -1
    io_at(channel, file.flushing).phase = SYNC
    prepare_flush(view(channel.engine, ENGINE), file.flushing, file.file)
