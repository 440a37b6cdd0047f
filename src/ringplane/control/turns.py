"""Operations that are done one at a time. Whoever asks for one waits only for a limited time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ringplane.control.operation_errors import Unavailable, WrongState

Result = TypeVar("Result")

# Seconds.
PATIENCE = 30.0

# Operations that may wait for one that does not end, because storage hangs for example.
MAX_WAITING = 8


class Turns:
    """The operations on one thing, in the order in which they were asked for. Used on the control thread."""

    def __init__(self, name: str) -> None:
        """`name`: of the thing, in messages."""
        self._name = name
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = False

    async def take(
        self, operation: str, work: Callable[[], Coroutine[Any, Any, Result]], patience: float = PATIENCE
    ) -> Result:
        """Its result. It is never done in part: when the caller does not wait any more, it continues.

        Raises Unavailable when it has not ended in `patience` seconds, or if too many others wait; WrongState after
        `end`; and what `work` raises.
        """
        if self._ended:
            raise self._gone()
        if len(self._tasks) > MAX_WAITING:
            raise Unavailable(
                f"{len(self._tasks)} operations wait already, because storage does not answer", self._name, "ask later"
            )
        task = asyncio.ensure_future(self._in_turn(work))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait([task], timeout=patience)
        if not task.done():
            raise Unavailable(
                f"{operation} has not ended after {patience:g} seconds, because storage has not completed requests",
                self._name,
                "it continues; ask again to wait for its end",
            )
        if task.cancelled():
            raise self._gone()
        return task.result()

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with self._lock:
            return await work()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Nobody may be waiting for it any more; then asyncio would log that its exception was not looked at.
        if not task.cancelled():
            task.exception()

    def end(self) -> None:
        """Nothing is done any more: the thing has gone."""
        self._ended = True
        for task in self._tasks:
            task.cancel()

    def _gone(self) -> WrongState:
        return WrongState("has stopped, or stops now", self._name, "ask GET /v1/disks for the disks that are served")
