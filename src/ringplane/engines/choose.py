"""Which engine a worker gets: the one that was asked for, or the best that this kernel allows."""

from __future__ import annotations

import logging

from ringplane.engines.aio import Aio
from ringplane.engines.uring import Uring

log = logging.getLogger(__name__)

AUTO = "auto"
ENGINES: dict[str, type[Aio] | type[Uring]] = {Uring.name: Uring, Aio.name: Aio}


def make_engine(name: str, capacity: int) -> Aio | Uring:
    """An engine for `capacity` requests; `name` is one of ENGINES, or AUTO. Raises OSError where it cannot be had."""
    if name != AUTO:
        return ENGINES[name](capacity)
    try:
        return Uring(capacity)
    except OSError as error:
        # Containers and hardened distributions forbid io_uring; kernels before 6.1 lack what it needs here.
        log.info("using Linux AIO, as io_uring is not to be had here: %s", error)
        return Aio(capacity)
