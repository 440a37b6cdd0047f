"""Guest memory registered with the kernel (`--pin-memory`), so that it need not look up the pages of each request."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

from ringplane.engines.aio import Aio
from ringplane.engines.uring import Uring
from ringplane.guest_memory.regions import MemoryTable

log = logging.getLogger(__name__)


class Pinning:
    """The memory that a worker's engine has registered. If that fails, guests are served without it from then on."""

    def __init__(self, engine: Aio | Uring, worker_name: str, *, wanted: bool) -> None:
        self._engine = engine
        self._worker_name = worker_name
        self._wanted = wanted

    def pin(self, tables: Iterable[MemoryTable]) -> None:
        """Register the memory of these tables, and nothing else any longer."""
        if not self._wanted:
            return
        try:
            self._engine.pin({region.mapping for table in tables for region in table.regions})
        except OSError as error:
            log.warning("%s: cannot pin the guests' memory; continuing without: %s", self._worker_name, error)
            self._wanted = False
            with contextlib.suppress(OSError):
                self._engine.pin(())
