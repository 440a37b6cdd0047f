"""Calls that may block, or hang with storage, for coroutines: each has a thread of its own, so none waits for another.

All threads of a pool may hang, and then other calls wait. So there is no pool, and callers set the limit: a disk has at
most three calls at a time (an operation, a flush for its front end, its end), and a process adds few disks at a time
(control/server.py).
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
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
    done: Future[Result] = Future()
    # From now on it cannot be cancelled.
    done.set_running_or_notify_cancel()
    try:
        threading.Thread(target=_call, args=(function, done), name=NAME, daemon=True).start()
    except RuntimeError:
        raise NoThread from None
    return await asyncio.wrap_future(done)


def _call(function: Callable[[], Result], done: Future[Result]) -> None:
    libc.name_thread(NAME)
    try:
        result = function()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(result)
