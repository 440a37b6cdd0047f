"""Which engine a worker and a disk get: the one that was asked for, or the best that kernel and image allow."""

from __future__ import annotations

import logging

from ringplane.engines import memory
from ringplane.engines.aio import Aio
from ringplane.engines.common import IN_MEMORY, NOWHERE, THROUGH_WORKER
from ringplane.engines.uring import Uring

log = logging.getLogger(__name__)

AUTO, MEMORY, NULL = "auto", "memory", "null"
WORKER_ENGINES: dict[str, type[Aio] | type[Uring]] = {Uring.name: Uring, Aio.name: Aio}
ENGINES = (AUTO, *WORKER_ENGINES, MEMORY, NULL)


def make_engine(name: str, capacity: int) -> Aio | Uring:
    """A worker's engine for `capacity` requests; disks that need none leave the choice of it open.

    Raises OSError where the one that was asked for cannot be had.
    """
    if name in WORKER_ENGINES:
        return WORKER_ENGINES[name](capacity)
    try:
        return Uring(capacity)
    except OSError as error:
        # Containers and hardened distributions forbid io_uring; kernels before 6.1 lack what it needs here.
        log.info("using Linux AIO, as io_uring is not to be had here: %s", error)
        return Aio(capacity)


def choose_storage(name: str, fd: int) -> int:
    """How a disk's I/O is done (engines.common); raises ValueError where the image cannot be served by this engine."""
    if name == NULL:
        return NOWHERE
    if name in WORKER_ENGINES:
        return THROUGH_WORKER
    if memory.is_memory(fd):
        return IN_MEMORY
    if name == MEMORY:
        raise ValueError("the engine memory serves images on tmpfs and hugetlbfs alone; this one is not")
    return THROUGH_WORKER
