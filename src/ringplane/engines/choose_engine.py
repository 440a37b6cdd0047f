"""The choice of an engine for an I/O thread: the requested one, or the best that the kernel allows."""

from __future__ import annotations

import logging

from ringplane.compiler.units import Unit
from ringplane.engines.aio import Aio, Epoll
from ringplane.engines.common import EngineUnavailable
from ringplane.engines.uring import Uring
from ringplane.options.engine_names import AIO, IO_URING

log = logging.getLogger(__name__)

Engine = Aio | Uring

WORKER_ENGINES: dict[str, type[Aio] | type[Uring]] = {IO_URING: Uring, AIO: Aio}


def units_of(name: str) -> tuple[Unit, ...]:
    """The units of the engine that `make_engine` will probably choose; others are compiled when it has chosen."""
    return WORKER_ENGINES[name].units if name in WORKER_ENGINES else Uring.units


def make_engine(name: str, capacity: int) -> Engine:
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
