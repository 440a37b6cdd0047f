"""Compiling the data plane in advance, in a child process."""

from __future__ import annotations

import logging
import os

from ringplane.block import ranges
from ringplane.block.layers import zoned
from ringplane.block.sources import memory, null
from ringplane.block.stack import Stack
from ringplane.compiler.apart import compile_apart, run_child
from ringplane.compiler.cache import find_cache, forget_old_versions, is_cached
from ringplane.compiler.interpreted import INTERPRETED, VARIABLE, load_intrinsics
from ringplane.dataplane import zone_requests
from ringplane.dataplane.queue import Device, Queue, RingLayout
from ringplane.dataplane.worker import Worker
from ringplane.guest_memory.regions import MemoryTable, Region
from ringplane.system.libc import drop_code
from ringplane.system.signals import NONE, Signals
from ringplane.virtio.blk import SECTOR

log = logging.getLogger(__name__)

# The size of the disk and of the guest memory that are used to warm up.
SIZE = 4096


def warm_up(signals: Signals = NONE) -> None:
    """Fill the cache if it is empty; raises Interrupted. If no child process can be started, the first worker compiles.

    That compilation cannot be interrupted, because an exception must not be raised in the middle of it.
    """
    if INTERPRETED:
        log.warning("the data plane is interpreted, because %s is set: it is slow, and not confined", VARIABLE)
        load_intrinsics()
        return
    if is_cached():
        return
    if why := find_cache().short_lived:
        log.warning("compiling the data plane, which takes some 20 s of CPU time, at each start: %s", why)
    else:
        log.info("compiling the data plane; only the first start after an installation does this ...")
    compile_apart(__name__, signals)


def release_compiler() -> None:
    """Release the memory of LLVM's code, which from now on only loads cached code: a third of a small process."""
    drop_code("libllvmlite.so")


def load() -> None:
    """Compile or load all that a worker needs, by running a worker with a small disk in memory."""
    kick_fd = os.eventfd(0)
    fd = os.memfd_create("warm-up")
    os.ftruncate(fd, SIZE)
    device = Device(SIZE, read_only=False, block_size=SECTOR, serial="", name="warm-up")
    # Whether or not a disk needs them.
    for each in (ranges.apply, memory.submit, null.submit, zoned.down, zoned.up, zoned.helped):
        each.address()
    for begin, end in zone_requests.TYPES.values():
        begin.address()
        if end:
            end.address()
    queue = Queue(device, 0, Stack(null.NullPart()))
    layout = RingLayout(size=1, desc=0, avail=64, used=128, base=0, features=0, write_through=False)
    worker = Worker("warm-up", slots=1)
    worker.load()
    worker.start()
    worker.start_queue(queue, layout, MemoryTable([Region.map(0, 0, SIZE, 0, fd)]), kick_fd).result()
    worker.stop_queue(queue).result()
    worker.stop()
    forget_old_versions()


if __name__ == "__main__":
    run_child(load)
