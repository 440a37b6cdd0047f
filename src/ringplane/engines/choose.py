"""The choice of an engine for a worker and for a disk: the requested one, or the best that kernel and image allow."""

from __future__ import annotations

import logging

from ringplane.engines import memory
from ringplane.engines.aio import Aio, Epoll
from ringplane.engines.common import IN_MEMORY, NOWHERE, THROUGH_WORKER, EngineUnavailable
from ringplane.engines.uring import Uring
from ringplane.options.engine_names import AIO, IO_URING, MEMORY, NULL

log = logging.getLogger(__name__)

WORKER_ENGINES: dict[str, type[Aio] | type[Uring]] = {IO_URING: Uring, AIO: Aio}


def make_engine(name: str, capacity: int) -> Aio | Uring:
    """A worker's engine for `capacity` requests; for disks that do not use it, any one will do.

    Raises EngineUnavailable if a requested engine is unavailable. If AUTO finds none, the result is `Epoll`, without
    I/O.
    """
    if name in WORKER_ENGINES:
        return WORKER_ENGINES[name](capacity)
    try:
        return Uring(capacity)
    except OSError as error:
        # Containers and hardened distributions forbid io_uring; kernels before 6.1 lack what it needs here.
        without_uring = str(error)
    try:
        engine = Aio(capacity)
    except EngineUnavailable as error:
        return Epoll(capacity, f"{without_uring}; {error}")
    log.info("using Linux AIO: %s", without_uring)
    return engine


def choose_storage(name: str, fd: int) -> int:
    """How a disk's I/O is done (engines.common); raises ValueError if this engine cannot serve the image."""
    if name == NULL:
        return NOWHERE
    if name in WORKER_ENGINES:
        return THROUGH_WORKER
    if memory.is_memory(fd):
        return IN_MEMORY
    if name == MEMORY:
        raise ValueError("engine memory serves only images on tmpfs and hugetlbfs; use --engine auto for this image")
    return THROUGH_WORKER
