"""Counts how often another process reads some bytes of its memory, by the processor's debug registers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

# perf_event_open(2) and include/uapi/linux/perf_event.h, hw_breakpoint.h
SYS_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}[platform.machine()]
PERF_TYPE_BREAKPOINT, HW_BREAKPOINT_RW = 5, 3
DISABLED, EXCLUDE_KERNEL, EXCLUDE_HV = 1 << 0, 1 << 5, 1 << 6
ENABLE = 0x2400
# type, size, config, sample_period, sample_type, read_format, flags, wakeup_events, bp_type, bp_addr, bp_len
ATTR = struct.Struct("=IIQQQQQIIQQ48x")


class Watchpoint:
    """Counts reads and writes of `size` bytes by the threads of a process, not by the kernel on their behalf."""

    def __init__(self, pid: int, address: int, size: int) -> None:
        """`size` is 1, 2, 4 or 8, and the address a multiple of it. Raises OSError."""
        flags = DISABLED | EXCLUDE_KERNEL | EXCLUDE_HV
        attr = ATTR.pack(PERF_TYPE_BREAKPOINT, ATTR.size, 0, 0, 0, 0, flags, 0, HW_BREAKPOINT_RW, address, size)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fds: list[int] = []
        for thread in os.listdir(f"/proc/{pid}/task"):
            fd = libc.syscall(SYS_PERF_EVENT_OPEN, attr, int(thread), -1, -1, 0)
            if fd < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._fds.append(fd)

    @property
    def count(self) -> int:
        return sum(int.from_bytes(os.read(fd, 8), "little") for fd in self._fds)

    def __enter__(self) -> Self:
        for fd in self._fds:
            fcntl.ioctl(fd, ENABLE, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for fd in self._fds:
            os.close(fd)


def why_not() -> str:
    """Why watchpoints are unavailable here; empty where they are available."""
    word = ctypes.c_uint64()
    try:
        with Watchpoint(os.getpid(), ctypes.addressof(word), 8):
            return ""
    except OSError as error:
        hint = " (root may, or kernel.perf_event_paranoid)" if error.errno in (errno.EACCES, errno.EPERM) else ""
        return f"no watchpoints: {error.strerror}{hint}"


def address_in(pid: int, fd: int, offset: int) -> int:
    """The address at which a process has mapped byte `offset` of the file that we have open as `fd`."""
    inode = os.fstat(fd).st_ino
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, _, begins, _, number, *_ = line.split()
        start, end = (int(address, 16) for address in place.split("-"))
        if int(number) == inode and 0 <= offset - int(begins, 16) < end - start:
            return start + offset - int(begins, 16)
    raise LookupError(f"byte {offset} of inode {inode}")
