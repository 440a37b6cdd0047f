"""SIGBUS: the signal that a copy raises when a page of a mapping is missing, because the mapped file was truncated.

Our handler maps an anonymous page of zeros there, stores 1 at an address that was given for the mapping, and signals an
eventfd if there is one. So the copy ends, and the copying thread, or the one that waits for the eventfd, learns that
the data is invalid. A SIGBUS at any other address goes to the previous handler. The handler is compiled, because a
Python handler would run only after the copy, which would never end.
"""

from __future__ import annotations

import errno
import heapq
import signal
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ringplane.compiler.interpreted import INTERPRETED
from ringplane.compiler.intrinsics import intrinsic
from ringplane.compiler.units import unit
from ringplane.native.access import load32, load64, store64, view
from ringplane.native.syscalls import mmap_anonymous_page, write
from ringplane.system import libc

# As many mappings as Linux lets a process have (vm.max_map_count, 65530 by default).
MAX_GUARDS = 1 << 16
SA_SIGINFO, SA_NODEFER = 4, 0x4000_0000
SIGINFO_CODE, SIGINFO_ADDRESS = 8, 16
SIG_IGN = 1
# The sign bit of si_code: SI_USER is 0, other senders are negative, faults positive.
SENT_BY_PROCESS = 1 << 31

# A guarded mapping: [start, end), its page size, where to store 1, and an eventfd or -1. `end` is 0 if not in use.
GUARD = np.dtype([(name, "<i8") for name in ("start", "end", "page", "lost", "alarm_fd")])
GUARD_SIZE = GUARD.itemsize

# previous: the action to restore, a SIGACTION, whose first field is the handler; used: the most guards that were ever
# in use at a time; one: the number 1, for eventfds; guards: GUARD structs
TABLE = np.dtype(
    [("previous", "u1", (libc.SIGACTION.size,)), ("used", "<i8"), ("one", "<i8"), ("guards", GUARD, (MAX_GUARDS,))]
)
TABLE_USED, TABLE_ONE, TABLE_GUARDS = (TABLE.fields[name][1] for name in ("used", "one", "guards"))  # type: ignore[index]


@intrinsic
def _table_variable(llvm: Any) -> Any:
    """The address of a static variable of the handler, whose cached code cannot contain the address of the TABLE."""
    return llvm.static("ringplane_sigbus_table")


@intrinsic
def _restore_action(llvm: Any, number: Any, action: Any) -> None:
    """sigaction(2): set the action at address `action` for signal `number`."""
    llvm.call("sigaction", [llvm.narrow(number, 32), action, llvm.number(0)], bits=32)


@intrinsic
def _raise(llvm: Any, number: Any) -> None:
    """raise(3)"""
    llvm.call("raise", [llvm.narrow(number, 32)], bits=32)


@intrinsic
def _call_handler(llvm: Any, handler: Any, number: Any, info: Any, ucontext: Any) -> None:
    """Call a signal handler, with one or with three parameters."""
    llvm.call_address(handler, [llvm.narrow(number, 32), info, ucontext], bits=0)


@unit
def _on_sigbus(number, info, context):
    """The handler. Called by `_Guards` with number 0, it takes `info` as the address of the TABLE."""
    if number == 0:
        store64(_table_variable(), info)
        return 0
    table = load64(_table_variable())
    address = load64(info + SIGINFO_ADDRESS)
    for index in range(load64(table + TABLE_USED)):
        guard = view(table + TABLE_GUARDS + index * GUARD_SIZE, GUARD)
        if guard.start <= address < guard.end:
            # Before the page is mapped: another thread's copy that finds the new page must find this store too.
            store64(guard.lost, 1)
            mmap_anonymous_page(address // guard.page * guard.page, guard.page)
            if guard.alarm_fd >= 0:
                write(guard.alarm_fd, table + TABLE_ONE, 8)
            return 0
    previous = load64(table)
    if previous > SIG_IGN:
        _call_handler(previous, number, info, context)
        return 0
    # The instruction is repeated, and now it ends the process. A signal sent by a process is raised again to end it.
    _restore_action(number, table)
    if load32(info + SIGINFO_CODE) & SENT_BY_PROCESS or load32(info + SIGINFO_CODE) == 0:
        _raise(number)
    return 0


class _Guards:
    """The handler and its table: installed with the first guard, until the process ends."""

    def __init__(self) -> None:
        self._table: npt.NDArray[np.void] = np.zeros(1, TABLE)
        self._table["one"] = 1
        # Free numbers below `used`: the lowest is reused first, because the handler scans all up to `used`.
        self._free: list[int] = []
        # A handler must be compiled. Interpreted, the signal ends the process.
        if not INTERPRETED:
            self._install(int(self._table.ctypes.data))

    def _install(self, table: int) -> None:
        _on_sigbus(0, table, 0)
        libc.sigaction(signal.SIGBUS, _on_sigbus.address(), SA_SIGINFO | SA_NODEFER, table)

    def add(self, start: int, size: int, page: int, lost: int, alarm_fd: int) -> int:
        used = int(self._table["used"][0])
        if not self._free and used == MAX_GUARDS:
            raise OSError(errno.ENOMEM, f"{MAX_GUARDS} images and memory regions are already mapped: the limit")
        number = heapq.heappop(self._free) if self._free else used
        guard = self._table["guards"][0][number]
        guard["start"], guard["page"], guard["lost"], guard["alarm_fd"] = start, page, lost, alarm_fd
        # Last, because the handler may scan the table at any time.
        guard["end"] = start + size
        self._table["used"] = max(used, number + 1)
        return number

    def remove(self, number: int) -> None:
        self._table["guards"][0][number]["end"] = 0
        heapq.heappush(self._free, number)


_lock = threading.Lock()
_guards: _Guards | None = None


def install() -> None:
    """Load and install the handler now, instead of with the first guard."""
    global _guards
    with _lock:
        if _guards is None:
            _guards = _Guards()


def guard(start: int, size: int, page: int, lost: int, alarm_fd: int = -1) -> int:
    """Guard a mapping with pages of `page` bytes: 1 is stored at address `lost` when one of them is missing.

    The eventfd `alarm_fd` is signalled too; it must be non-blocking, and stay open until `release`. Raises OSError.
    """
    install()
    with _lock:
        assert _guards is not None
        return _guards.add(start, size, page, lost, alarm_fd)


def release(number: int) -> None:
    """Remove a guard, before its mapping is unmapped."""
    with _lock:
        assert _guards is not None
        _guards.remove(number)
