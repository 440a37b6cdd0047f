"""Operations that are done one or a few at a time. Whoever asks for one waits only for a limited time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ringplane.control.operation_errors import Unavailable, WrongState

Result = TypeVar("Result")

# An operation is in it from before its turn until it has ended.
Around = Callable[[], contextlib.AbstractAsyncContextManager[None]]

# Seconds.
PATIENCE = 30.0

# What to do if an operation has not ended by then, where it is the same if it is done twice.
AGAIN = "it continues; ask again to wait for its end"

# Operations that have begun or wait for their turn, whether or not somebody still waits for them: there are not more if
# one does not end, because storage hangs for example. Further ones wait for a place as long as their callers do.
MAX_TAKEN = 8


class Turns:
    """The operations on one thing, in the order in which they were asked for. Used on the control thread."""

    def __init__(self, name: str, at_once: int = 1, waits_for: Callable[[], str] = str) -> None:
        """`name`: of the thing, in messages; `at_once`: how many are done at the same time.

        `waits_for`: what hangs, if that is known, for an operation that has not ended.
        """
        self._name, self._waits_for = name, waits_for
        self._turn = asyncio.Semaphore(at_once)
        self._places = asyncio.Semaphore(MAX_TAKEN)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended = False
        # The operation that has begun last.
        self._begun = ""

    async def take(
        self,
        operation: str,
        work: Callable[[], Coroutine[Any, Any, Result]],
        patience: float = PATIENCE,
        *,
        around: Around = contextlib.nullcontext,
        later: str = AGAIN,
    ) -> Result:
        """Its result. It is never done in part: when the caller does not wait any more, it continues.

        `later` says what the caller can do then.

        Raises Unavailable when it has not ended, or not begun, in `patience` seconds; WrongState after `end`; and what
        `work` raises.
        """
        end = asyncio.get_running_loop().time() + patience
        await self._wait_for_a_place(operation, patience)
        task = asyncio.ensure_future(self._in_turn(operation, work, around))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait([task], timeout=max(0.0, end - asyncio.get_running_loop().time()))
        if not task.done():
            why = self._waits_for()
            raise Unavailable(
                f"{operation} has not ended after {patience:g} seconds{': ' if why else ''}{why}",
                self._name,
                later,
            )
        if task.cancelled():
            raise self._gone()
        return task.result()

    async def _wait_for_a_place(self, operation: str, patience: float) -> None:
        try:
            async with asyncio.timeout(patience):
                await self._places.acquire()
        except TimeoutError:
            raise Unavailable(
                f"{operation} was not begun: {MAX_TAKEN} operations wait already, and none has ended in "
                f"{patience:g} seconds",
                self._name,
                "ask later",
            ) from None
        if self._ended:
            self._places.release()
            raise self._gone()

    async def _in_turn(self, operation: str, work: Callable[[], Coroutine[Any, Any, Result]], around: Around) -> Result:
        async with around(), self._turn:
            self._begun = operation
            return await work()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._places.release()
        # Nobody may be waiting for it any more; then asyncio would log that its exception was not looked at.
        if not task.cancelled():
            task.exception()

    async def hold(self, patience: float) -> None:
        """Take a turn without an operation, until `release`; if they are done one at a time, none begins meanwhile.

        Raises Unavailable if it does not come in `patience` seconds.
        """
        try:
            async with asyncio.timeout(patience):
                await self._turn.acquire()
        except TimeoutError:
            raise Unavailable(
                f"{self._begun} has not ended after {patience:g} seconds", self._name, "try again when it has"
            ) from None

    def release(self) -> None:
        """The end of `hold`."""
        self._turn.release()

    def end(self) -> None:
        """Nothing is done any more: the thing has gone."""
        self._ended = True
        for task in self._tasks:
            task.cancel()

    def _gone(self) -> WrongState:
        return WrongState("has stopped, or is stopping", self._name, "list the disks to see those that are served")
