"""Have a thread come back from a system call in which it waits, for something that may never come."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading

from ringplane.native import libc

# By default it does nothing, so nobody is surprised by it; but only a signal that has a handler ends a system call.
SIGNAL = signal.SIGURG


def install() -> None:
    """Give the signal a handler that does nothing, unless it has one.

    Python's own would have to be set by the main thread. abs(3) is what a handler that does nothing looks like, and
    needs no compiler. System calls are not restarted after it (signal(7), sigaction(2) without SA_RESTART).
    """
    if signal.getsignal(SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN):
        libc.sigaction(SIGNAL, ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value or 0)


def interrupt(thread: threading.Thread) -> None:
    """What the thread waits in, if anything, ends with EINTR, where the kernel lets it; if it has ended: nothing."""
    with contextlib.suppress(ProcessLookupError):
        if thread.ident is not None:
            signal.pthread_kill(thread.ident, SIGNAL)
