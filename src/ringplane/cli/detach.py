"""A command whose first process returns when the work has begun, which continues in the background."""

from __future__ import annotations

import os
from collections.abc import Callable


def detach() -> Callable[[], None]:
    """Continue in a process that is nobody's child; call the result when the first process may return, with status 0.

    If this process ends before, the status is 1. Signals of the first process are ours until then, because both have
    the pipe of CaughtSignals. Call it before any thread is started.
    """
    began, begin = os.pipe2(os.O_CLOEXEC)
    if child := os.fork():
        os.close(begin)
        os.waitpid(child, 0)
        os._exit(0 if os.read(began, 1) else 1)
    os.setsid()
    # A service manager adopts and watches a process without a parent (systemd: MAINPID=).
    if os.fork():
        os._exit(0)
    os.close(began)

    def let_return() -> None:
        os.write(begin, b"1")
        os.close(begin)

    return let_return
