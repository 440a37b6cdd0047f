"""How a test notices that the sandbox is too strict: a call that it does not allow ends the process instead of failing.

One call may fail: before glibc first shrinks the heap of a thread, it reads /proc/sys/vm/overcommit_memory, and does
without if it cannot. So here it shrinks none (M_TRIM_THRESHOLD).
"""

from __future__ import annotations

# The beginning of a program for `python -c`; a command of ringplane follows.
STRICT = """
import ctypes
import functools
ctypes.CDLL(None).mallopt(-1, 1 << 30)
from ringplane.control import sandbox
from ringplane.system.seccomp import SECCOMP_RET_KILL_PROCESS
sandbox.confine = functools.partial(sandbox.confine, otherwise=SECCOMP_RET_KILL_PROCESS)
"""

STRICT_SERVE = f"""{STRICT}
from ringplane.cli.serve import serve
serve()
"""
