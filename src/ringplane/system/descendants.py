"""The descendants of this process: they end when it wants, daemons included."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# In seconds.
BETWEEN_ROUNDS = 0.001

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_descendants() -> None:
    """From now on a descendant whose parent has ended becomes a child of this process. Raises OSError."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """This process is killed when the thread that started it ends. Raises OSError."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_descendants() -> None:
    """Kill all descendants, and wait for their end. This process has adopted those whose parents had ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            # The children of one that has ended are children of this process then: they are killed in the next round.
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
            time.sleep(BETWEEN_ROUNDS)


def _children() -> Iterator[int]:
    """Not all kernels have /proc/PID/task/TID/children."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may have ended.
        with contextlib.suppress(OSError):
            # Its name, in parentheses, may contain anything; its state and its parent follow.
            if int(path.read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                yield int(path.parent.name)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(2): {os.strerror(code)}")
