"""Calls that may block, or hang with storage, for coroutines: each has a thread of its own, so none waits for another.

All threads of a pool may hang, and then other calls wait. So there is no pool, and callers set the limit: a disk has at
most three calls at a time (an operation, a flush for its front end, its end), and a process adds few disks at a time
(control/server.py). A source that gives up such a call after a time limit of its own makes it with `TimedCalls`
(time_limits.py), which has another thread for it, and says how many of these may be left.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from ringplane.system import libc
from ringplane.system.notes import NO_THREAD

Result = TypeVar("Result")

# The name of these threads, in ps(1) too.
NAME = "ringplane-calls"


class NoThread(OSError):
    """No thread can be started for a call, which was not made."""

    def __init__(self) -> None:
        super().__init__(errno.EAGAIN, NO_THREAD)


async def aside(function: Callable[[], Result]) -> Result:
    """The result of a function, called on a thread of its own. It continues if nobody waits for it any more.

    Raises NoThread.
    """
    return await asyncio.wrap_future(begin_aside(function))


def begin_aside(function: Callable[[], Result]) -> Future[Result]:
    """The same for callers that are not coroutines. Raises NoThread."""
    done: Future[Result] = Future()
    # From now on it cannot be cancelled.
    done.set_running_or_notify_cancel()
    start_thread(NAME, partial(_call, function, done))
    return done


def start_thread(name: str, function: Callable[[], object]) -> None:
    """Call it on a thread of this name, which does not keep the process from ending. Raises NoThread."""

    def run() -> None:
        libc.name_thread(name)
        function()

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError:
        raise NoThread from None


def _call(function: Callable[[], Result], done: Future[Result]) -> None:
    try:
        result = function()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
