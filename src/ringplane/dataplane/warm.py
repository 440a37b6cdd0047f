"""Compiling the data plane in advance, in a child process: the compiler's memory (some 90 MB) is freed with it."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys

from ringplane.dataplane.queue import Device, Queue, RingLayout
from ringplane.dataplane.worker import Worker
from ringplane.engines.common import IN_MEMORY
from ringplane.memory import MemoryTable, Region
from ringplane.native.cache import VARIABLE, find_cache, forget_old_versions, is_cached
from ringplane.native.libc import drop_code
from ringplane.virtio.blk import SECTOR

log = logging.getLogger(__name__)

# The size of the disk and of the guest memory that are used to warm up.
SIZE = 4096


def warm_up() -> None:
    """Fill the cache if it is empty. If no child process can be started, the first worker compiles."""
    if is_cached():
        return
    cache = find_cache()
    if cache.short_lived:
        log.warning("compiling the data plane, which takes some 20 s of CPU time, at each start: %s", cache.short_lived)
    else:
        log.info("compiling the data plane; only the first start after an installation does this ...")
    if cache.folder is None:
        return
    environment = {**os.environ, VARIABLE: str(cache.folder.parent)}
    command = [sys.executable, "-m", "ringplane.dataplane.warm"]
    try:
        # No input, without /dev/null, which some jails lack.
        done = subprocess.run(command, env=environment, input=b"", capture_output=True, check=False)
    except OSError as error:
        log.warning("cannot compile in a process of its own: %s", error)
        return
    if done.returncode != 0:
        log.warning("compiling failed: %s", done.stderr.decode(errors="replace").strip().rpartition("\n")[2])


def release_compiler() -> None:
    """Release the memory of LLVM's code, which from now on only loads cached code: a third of a small process."""
    drop_code("libllvmlite.so")


def load() -> None:
    """Compile or load all that a worker needs, by running a worker with a small disk in memory."""
    kick_fd = os.eventfd(0)
    fd = os.memfd_create("warm-up")
    os.ftruncate(fd, SIZE)
    device = Device(
        fd, SIZE, read_only=False, block_size=SECTOR, alignment=(1, 1), serial="", name="warm-up", storage=IN_MEMORY
    )
    queue = Queue(device, 0)
    layout = RingLayout(size=1, desc=0, avail=64, used=128, base=0, features=0, write_through=False)
    worker = Worker("warm-up", slots=1)
    worker.start()
    worker.start_queue(queue, layout, MemoryTable([Region.map(0, 0, SIZE, 0, fd)]), kick_fd).result()
    worker.stop_queue(queue).result()
    worker.stop()
    device.close()
    forget_old_versions()


if __name__ == "__main__":
    # Compiling leaves hardly any cyclic garbage; collecting it takes 0.3 s of 6, and the process ends soon.
    gc.disable()
    load()
