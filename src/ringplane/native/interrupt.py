"""Interrupting a thread that blocks in a system call, possibly forever."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading

from ringplane.system import libc

# By default this signal is ignored, so it is harmless; but only a signal with a handler ends a system call.
SIGNAL = signal.SIGURG


def install() -> None:
    """Give the signal a handler that does nothing, unless it has a handler.

    A Python handler could only be set by the main thread. abs(3) has the signature of a handler, does nothing, and
    needs no compiler. System calls are not restarted after it (signal(7), sigaction(2) without SA_RESTART).
    """
    if signal.getsignal(SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN):
        libc.sigaction(SIGNAL, ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p).value or 0)


def interrupt(thread: threading.Thread) -> None:
    """The system call in which the thread blocks, if any, ends with EINTR; no effect if the thread has ended."""
    with contextlib.suppress(ProcessLookupError):
        if thread.ident is not None:
            signal.pthread_kill(thread.ident, SIGNAL)
