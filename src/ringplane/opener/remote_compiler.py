"""Our end of the process that compiles policies (compiling_process.py). What it sends is checked: it is not trusted.

It is a child of the process that opens files. It may be asked from any thread, by one at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading

from ringplane.opener.compile_requests import (
    ANSWER,
    C_FUNCTIONS,
    LONGEST_ANSWER,
    MADE,
    READY,
    Request,
    packed_setup,
)
from ringplane.opener.opener import Compiled, OpenerEnded
from ringplane.system import code_window
from ringplane.system.signals import NONE, Signals
from ringplane.system.syscall_numbers import MACHINE

# What compiles in that process; it is not imported here.
MODULE = "ringplane.policies.making"

# The only machine whose code is linked (compiler/linker.py).
MACHINES = ("x86_64",)

# Seconds for an answer: more than that process allows. For its start.
PATIENCE, START_PATIENCE = 630.0, 60.0

HIGHEST_NUMBER = (1 << 32) - 1

ENDED = "the process that compiles policies has ended; restart ringplane to load others (those of disks continue)"


class RemoteCompiler:
    """One that can be asked after `wait_until_ready`."""

    def __init__(self) -> None:
        """Raises OSError if this system does not have what it takes."""
        if MACHINE not in MACHINES:
            raise OSError(f"no code can be linked for {MACHINE}")
        self._code = code_window.create()
        self._sock, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._number, self._address = 0, 0

    @property
    def fds(self) -> tuple[int, int]:
        """Those that the other process is started with: its socket, and the memory for code."""
        return self._other.fileno(), self._code

    def started(self) -> None:
        """The other process has them."""
        self._other.close()

    def wait_until_ready(self, signals: Signals = NONE) -> bool:
        """Whether it is. Raises Interrupted. May be called again."""
        if self._code < 0:
            return self._address != 0
        try:
            if signals.wait(self._sock.fileno(), START_PATIENCE) and self._sock.recv(len(READY) + 1) == READY:
                self._address = code_window.map_for_running(self._code)
                self._sock.send(packed_setup([self._address, *_addresses()], [MODULE, *_places()]))
        except (OSError, ValueError):
            self._address = 0
        os.close(self._code)
        self._code = -1
        return self._address != 0

    def ask(self, folder: int, path: bytes, name: str, known: bytes) -> Compiled:
        """See Compiler."""
        with self._lock:
            self._number = self._number % HIGHEST_NUMBER + 1
            self._sock.settimeout(PATIENCE)
            try:
                self._sock.send(Request(folder, path, name.encode(), known).packed(self._number))
                return self._answer()
            except TimeoutError:
                raise OpenerEnded("a policy was not compiled: its storage does not answer; try again") from None
            except OSError:
                raise OpenerEnded(ENDED) from None

    def _answer(self) -> Compiled:
        """Raises OSError."""
        number = -1
        # Answers that came too late precede it.
        while number != self._number:
            message = self._sock.recv(LONGEST_ANSWER + 1)
            if not ANSWER.size <= len(message) <= LONGEST_ANSWER:
                raise OSError
            number, status, where, size = ANSWER.unpack_from(message)
        if status == MADE and where + size > code_window.SIZE:
            raise OSError
        return Compiled(status, self._address + where, size, message[ANSWER.size :].decode(errors="replace"))

    def close(self) -> None:
        """The other process ends."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._sock.close()
            self._other.close()
            if self._code >= 0:
                os.close(self._code)
                self._code = -1


def _addresses() -> list[int]:
    """Of C_FUNCTIONS, in this process."""
    library = ctypes.CDLL(None)
    return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in C_FUNCTIONS]


def _places() -> list[str]:
    """Where Python imports from, but for the current folder."""
    here = os.getcwd()
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = [package, *filter(os.path.isabs, sys.path), sys.prefix, sys.base_prefix]
    return [each for each in dict.fromkeys(found) if each != here or each == package]
