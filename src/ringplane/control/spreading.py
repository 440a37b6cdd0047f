"""The I/O threads of a disk that is described without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ringplane.options.disk_config import DiskConfig
from ringplane.options.thread_options import IoThread


def spread(io_threads: Iterable[IoThread], disks: Iterable[DiskConfig]) -> Sequence[str]:
    """All threads, and first, for queue 0, the one that has the fewest such queues of these disks."""
    names = [thread.name for thread in io_threads]
    used = Counter(disk.io_threads[0] for disk in disks)
    first = min(range(len(names)), key=lambda number: used[names[number]])
    return [*names[first:], *names[:first]]
