"""The descendants of this process: they end when it wants, daemons included."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

# <linux/prctl.h>
PR_SET_CHILD_SUBREAPER = 36

# In seconds.
BETWEEN_ROUNDS = 0.001

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_descendants() -> None:
    """From now on a descendant whose parent has ended becomes a child of this process. Raises OSError."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(2): {os.strerror(code)}")


def end_descendants(spared: Collection[int] = ()) -> None:
    """Kill all descendants, and wait for their end. This process has adopted those whose parents had ended.

    `spared` are children that it had before: it may have been executed by a process that had some.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            # This is all if there are none.
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
            # The children of one that has ended are children of this process then: they are killed in the next round.
            found = children() - set(spared)
            if not found:
                return
            for child in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(BETWEEN_ROUNDS)


def children() -> set[int]:
    """The children of this process. Not all kernels have /proc/PID/task/TID/children."""
    # Not with Path.glob: it fails if a process ends while it looks whether there is a file.
    pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    return {pid for pid in pids if _parent(pid) == os.getpid()}


def _parent(pid: int) -> int | None:
    # A process may have ended.
    with contextlib.suppress(OSError):
        # Its name, in parentheses, may contain anything; its state and its parent follow.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return None
