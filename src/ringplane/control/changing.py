"""Changes while a process runs: none begins while another process takes over, which would not learn of it.

Each is stored, if the process has a file for that (keeping.py), before whoever asked for it has an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from ringplane.control.operation_errors import Unavailable


class Changing:
    """What all changes of disks, limits and pauses have in common. Used on the control thread."""

    def __init__(self) -> None:
        self._under_way = 0
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._taken_over = False
        # Stores all changes so far. Raises Unavailable.
        self.store: Callable[[], Coroutine[Any, Any, None]] | None = None

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A change is made in this `async with`, which waits while no change is allowed; at its end it is stored.

        Raises Unavailable, also if it is made, but cannot be stored.
        """
        while not self._allowed.is_set():
            await self._allowed.wait()
        if self._taken_over:
            raise Unavailable("another process has taken over; ask again")
        self._under_way += 1
        try:
            yield
            if self.store is not None:
                await self._stored(self.store())
        finally:
            self._under_way -= 1

    async def _stored(self, store: Coroutine[Any, Any, None]) -> None:
        """It has ended. If nobody waits any more it is still under way: a thread writes what holds at that moment."""
        self._under_way += 1
        storing = asyncio.ensure_future(store)
        storing.add_done_callback(self._end_of_store)
        await asyncio.wait([storing])
        storing.result()

    def _end_of_store(self, storing: asyncio.Future[None]) -> None:
        self._under_way -= 1
        # Otherwise asyncio logs an exception that nobody looks at, and those who wait get it all the same.
        if not storing.cancelled():
            storing.exception()

    @contextlib.contextmanager
    def none(self) -> Iterator[bool]:
        """No change begins in this `with`; whether one is under way."""
        self._allowed.clear()
        try:
            yield bool(self._under_way)
        finally:
            self._allowed.set()

    def end(self) -> None:
        """Another process has taken over: no change is made any more, and none waits."""
        self._taken_over = True
        self._allowed.set()
