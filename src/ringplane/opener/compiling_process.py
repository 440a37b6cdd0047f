"""The process that compiles policies for another one, which has given up the right to do so (remote_compiler.py).

The process that opens files starts it, and it ends with that one. It opens a file of policies below the folders that
were named at the start, and forks a child for it, which checks and compiles the text, and ends. The child has time and
memory limits, because an author may have made a mistake, or mean harm. The code goes into the code window
(system/code_window.py), behind what is there already.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import mmap
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence

from ringplane.opener import open_requests
from ringplane.opener.allowed_folders import AllowedFolders, Folder
from ringplane.opener.compile_requests import (
    ANSWER,
    C_FUNCTIONS,
    LARGEST_FILE,
    LONGEST_REQUEST,
    LONGEST_SETUP,
    LONGEST_TEXT,
    MADE,
    NO_ROOM,
    READY,
    REFUSED,
    SHIPPED,
    TOO_LARGE,
    TOO_LONG,
    UNCHANGED,
    Request,
    parsed,
    parsed_setup,
)
from ringplane.opener.compiling_sandbox import confine, give_up_folders
from ringplane.system import code_window, libc
from ringplane.system.digests import blake2b

# Of a child: seconds of CPU time, and on the clock, and bytes of memory.
CPU_TIME, TIME, MEMORY = 20, 600, 2 << 30

# Code is placed at multiples of this (compiler/linker.py).
ALIGNMENT = 64
DIGEST_SIZE = 8

# What precedes what a child has made: MADE or REFUSED, and the size of the code. A text follows the code.
MADE_BY_CHILD = struct.Struct("=iI")
LARGEST_MADE = 1 << 20

STDIN, STDOUT = 0, 1


class NotMade(Exception):
    """There is no code, for this reason of compile_requests.py; `text` is for users."""

    def __init__(self, status: int, text: str = "") -> None:
        self.status, self.text = status, text


def begin(sock: int, code: int, ends: Sequence[int], paths: Sequence[str], folders: Sequence[Folder]) -> None:
    """Fork the process; the first two fds are its own. `paths` are those of the folders.

    `ends`: fds that can be read when this process, or the one that runs the code, has ended.
    """
    opener = os.getpid()
    if os.fork():
        os.close(sock)
        os.close(code)
        return
    try:
        # Not if this process is confined when it is killed: Landlock forbids that signal, too, and there are `ends`.
        libc.end_with_parent()
        # The socket of the process that opens files.
        os.dup2(STDOUT, STDIN)
        if os.getppid() == opener:
            _prefer_to_kill_this()
            _run(sock, code, ends, paths, folders)
    finally:
        os._exit(0)


def _prefer_to_kill_this() -> None:
    """If there is too little memory (proc(5)): what is compiled can be compiled again."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _run(fd: int, code: int, ends: Sequence[int], paths: Sequence[str], folders: Sequence[Folder]) -> None:
    window = code_window.map_for_writing(code)
    os.close(code)
    with socket.socket(fileno=fd) as sock:
        sock.send(READY)
        if setup := sock.recv(LONGEST_SETUP):
            (address, *functions), (module, *places) = parsed_setup(setup)
            python = confine(folders, places)
            compiling = _Compiling(window, address, dict(zip(C_FUNCTIONS, functions, strict=True)), module, places)
            _Serving(sock, ends, paths, folders, python, compiling).run()


class _Compiling:
    """What a child needs, and what has been placed so far."""

    def __init__(
        self, window: mmap.mmap, address: int, functions: dict[str, int], module: str, places: list[str]
    ) -> None:
        self.window, self.functions, self.module, self.places = window, functions, module, places
        self._address, self._used = address, 0

    @property
    def address(self) -> int:
        """Where the next code will be, in the process that runs it."""
        return self._address + self._used

    def place(self, code: bytes) -> int:
        """Put code behind all other, for good; returns where in the window it is. Raises NotMade."""
        begin, end = self._used, self._used + len(code)
        if end > code_window.SIZE:
            raise NotMade(NO_ROOM)
        self.window[begin:end] = code
        self._used = min(end + -end % ALIGNMENT, code_window.SIZE)
        return begin


class _Serving:
    def __init__(
        self,
        sock: socket.socket,
        ends: Sequence[int],
        paths: Sequence[str],
        folders: Sequence[Folder],
        python: Sequence[int],
        compiling: _Compiling,
    ) -> None:
        """`python`: the fds of what Python imports from."""
        self._sock, self._python, self._compiling = sock, python, compiling
        self._paths, self._folders, self._allowed = paths, folders, AllowedFolders(list(folders))
        self._poll = select.poll()
        # Only its end, while a child compiles.
        self._poll.register(sock, 0)
        for end in ends:
            self._poll.register(end, select.POLLIN)

    def run(self) -> None:
        while message := self._next():
            try:
                number, request = parsed(message, len(self._folders))
            except ValueError:
                return
            where, size, text = 0, 0, ""
            try:
                code, text = self._made(request)
                status, where, size = MADE, self._compiling.place(code), len(code)
            except NotMade as error:
                status, text = error.status, error.text
            except OSError as error:
                status = error.errno or REFUSED
            self._sock.send(ANSWER.pack(number, status, where, size) + text.encode()[:LONGEST_TEXT])

    def _next(self) -> bytes:
        """The next message; empty at the end."""
        self._wait_for(self._sock.fileno(), select.POLLIN)
        # Fds that came with it are closed by the kernel, because there is no room for them.
        return self._sock.recv(LONGEST_REQUEST + 1)

    def _wait_for(self, fd: int, events: int) -> None:
        """Wait until it can be read; the process ends if the other one does."""
        self._poll.register(fd, events)
        found = self._poll.poll()
        if fd == self._sock.fileno():
            self._poll.register(fd, 0)
        else:
            self._poll.unregister(fd)
        if any(each != fd for each, _ in found):
            os._exit(0)

    def _made(self, request: Request) -> tuple[bytes, str]:
        """Machine code, and what it is. Raises NotMade, OSError."""
        text = None if request.folder == SHIPPED else self._read(request)
        if text is not None and blake2b(text, digest_size=DIGEST_SIZE).digest() == request.known:
            raise NotMade(UNCHANGED)
        with self._child(request, text) as reading:
            said = self._all_of(reading)
        if len(said) < MADE_BY_CHILD.size:
            raise NotMade(TOO_LONG)
        status, size = MADE_BY_CHILD.unpack_from(said)
        code, after = said[MADE_BY_CHILD.size :][:size], said[MADE_BY_CHILD.size + size :].decode(errors="replace")
        if status != MADE:
            raise NotMade(REFUSED, after)
        if len(code) != size or len(after) > LONGEST_TEXT:
            raise NotMade(REFUSED, "its code or its descriptions are too long")
        return code, after

    def _read(self, request: Request) -> bytes:
        """The text of a file. Raises NotMade, OSError."""
        wanted = open_requests.Request(open_requests.OPEN, request.folder, request.path, how=open_requests.READ_ONLY)
        fd = self._allowed.do(wanted)
        assert fd is not None
        try:
            # Block devices can be opened, too.
            text = os.read(fd, LARGEST_FILE + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        finally:
            os.close(fd)
        if len(text) > LARGEST_FILE:
            raise NotMade(TOO_LARGE)
        return text

    def _all_of(self, reading: int) -> bytes:
        """What the child writes until its end; of what is too much the beginning."""
        said = part = b""
        while len(said) <= LARGEST_MADE:
            self._wait_for(reading, select.POLLIN)
            if not (part := os.read(reading, 1 << 16)):
                break
            said += part
        return said

    @contextlib.contextmanager
    def _child(self, request: Request, text: bytes | None) -> Iterator[int]:
        """The end of a pipe that can be read; it ends with the child."""
        reading, writing = os.pipe()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, reading)
            pid = os.fork()
            if pid == 0:
                self._be_child(writing, request, text)
            os.close(writing)
            try:
                yield reading
            finally:
                undo.close()
                os.waitpid(pid, 0)

    def _be_child(self, writing: int, request: Request, text: bytes | None) -> None:
        try:
            libc.end_with_parent()
            self._limit()
            said = self._compiled(request, text)
        except BaseException as error:
            said = MADE_BY_CHILD.pack(REFUSED, 0) + f"{type(error).__name__}: {error}".encode()
        try:
            while said:
                said = said[os.write(writing, said) :]
        finally:
            os._exit(0)

    def _limit(self) -> None:
        """Give up all that the child does not need."""
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.setitimer(signal.ITIMER_REAL, TIME)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_TIME, CPU_TIME))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        self._compiling.window.close()
        self._sock.close()
        give_up_folders(self._python)
        for folder in self._folders:
            os.close(folder.fd)

    def _compiled(self, request: Request, text: bytes | None) -> bytes:
        compiling = self._compiling
        sys.path[:] = compiling.places
        sys.dont_write_bytecode = True
        # There is hardly any garbage.
        gc.disable()
        module = importlib.import_module(compiling.module)
        path = os.path.join(self._paths[request.folder], os.fsdecode(request.path)) if text is not None else ""
        made, code, after = module.make(path, text, request.name.decode(), compiling.address, compiling.functions)
        said: bytes = MADE_BY_CHILD.pack(MADE if made else REFUSED, len(code)) + code + after.encode()
        return said
