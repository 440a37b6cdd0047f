"""A mounted file system with one file, controlled by a test: operations fail, are short, hang, or are recorded.

It uses /dev/fuse directly (<linux/fuse.h>, protocol 7.31), because a library would hide the order and the times of
requests and replies, which matter here. Replies may be delayed and sent in any order. The file system ends with this
process: when nobody has /dev/fuse open any more, the kernel fails all requests.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

NAME = "disk.img"

IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<6Q10I")
READ_IN, WRITE_IN = struct.Struct("<QQIIQII"), struct.Struct("<QQIIQII")
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 1, 2, 3, 4, 14, 15, 16, 17, 18, 20
INIT, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 26, 36, 38, 42, 43
ASYNC_READ, BIG_WRITES, ASYNC_DIO, WRITEBACK_CACHE, MAX_PAGES = 1 << 0, 1 << 5, 1 << 15, 1 << 16, 1 << 22
FATTR_SIZE = 1 << 3
ROOT, FILE = 1, 2
MAX_WRITE = 1 << 20
BACKGROUND = 256
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2
FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 0x02, 0x10

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(eq=False)
class Operation:
    """A request of the kernel: `kind` is "read", "write", "sync" or "allocate" (a range that becomes zeros)."""

    kind: str
    unique: int
    offset: int = 0
    size: int = 0
    data: bytes = b""
    stable: bool = False  # a write that ends when it is stable


@dataclass(frozen=True)
class Short:
    """Transfer only so many bytes."""

    size: int


HOLD = Short(-1)
# An errno, Short, HOLD (until `release`), or None: do it.
Rule = Callable[[Operation], "int | Short | None"]


def obey(operation: Operation) -> int | Short | None:
    """Do everything that is requested."""
    return None


class FuseFile:
    """The file system, mounted at `folder`; `path` is its file, `content` the data in the file."""

    def __init__(self, folder: Path, size: int, *, write_back: bool = False) -> None:
        """`write_back`: the kernel keeps written data in its page cache until fsync(2)."""
        self.path = folder / NAME
        self.content = bytearray(size)
        self.rule: Rule = obey
        # Returns an errno for the flags of open(2), or 0.
        self.open_rule: Callable[[int], int] = lambda flags: 0
        self.held: list[Operation] = []
        self.seen: list[Operation] = []
        self.failure: BaseException | None = None
        self._write_back = write_back
        self._folder = folder
        self._lock = threading.Lock()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._buffer = bytearray(MAX_WRITE + 4096)
        self._thread = threading.Thread(target=self._main, name="fuse", daemon=True)
        folder.mkdir()
        options = f"fd={self._fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV)
        if _libc.mount(b"ringplane", bytes(folder), b"fuse", flags, options.encode()) != 0:
            os.close(self._fd)
            raise OSError(ctypes.get_errno(), "mount(2)")
        self._thread.start()

    def release(self) -> None:
        """Do all operations that were held, and hold none from now on."""
        with self._lock:
            self.rule = obey
            held, self.held = self.held, []
        for operation in held:
            self.finish(operation, None)

    def answer_one(self, answer: int | Short | None = None) -> None:
        """Complete the operation that has been held longest; the rule stays."""
        with self._lock:
            operation = self.held.pop(0)
        self.finish(operation, answer)

    def close(self) -> None:
        """Unmount, even if the file system is in use: its users get errors."""
        _libc.umount2(bytes(self._folder), MNT_DETACH)
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._fd)
        os.close(self._wake)
        if self.failure is not None:
            raise self.failure

    # On the thread that serves it.

    def _main(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poll.poll(self.patience())]
                if self._wake in ready:
                    return
                if ready:
                    self._take()
                else:
                    self.idle()
        except BaseException as error:
            self.failure = error

    def patience(self) -> int | None:
        """How many milliseconds to wait for requests before `idle` is called; None: without limit."""
        return None

    def idle(self) -> None:
        """No request came within `patience`."""

    def _take(self) -> None:
        try:
            size = os.readv(self._fd, [self._buffer])
        except OSError as error:
            # ENOENT: interrupted before we read it; ENODEV: unmounted.
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.EAGAIN, errno.EINTR):
                return
            raise
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(self._buffer)
        with memoryview(self._buffer) as view:
            body = bytes(view[IN_HEADER.size : size])
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        operation = self._operation(opcode, unique, body)
        if operation is not None:
            self.seen.append(operation)
            self.arrive(operation)
        else:
            self._answer_about_files(opcode, unique, node, body)

    def _operation(self, opcode: int, unique: int, body: bytes) -> Operation | None:
        if opcode == READ:
            _, offset, size, *_ = READ_IN.unpack_from(body)
            return Operation("read", unique, offset, size)
        if opcode == WRITE:
            _, offset, size, _, _, flags, _ = WRITE_IN.unpack_from(body)
            data = body[WRITE_IN.size : WRITE_IN.size + size]
            return Operation("write", unique, offset, size, data, bool(flags & os.O_DSYNC))
        if opcode == FSYNC:
            return Operation("sync", unique)
        if opcode == FALLOCATE:
            _, offset, size, mode = struct.unpack_from("<QQQI", body)
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                return Operation("allocate", unique, offset, size)
        return None

    def arrive(self, operation: Operation) -> None:
        """An operation has come in; `finish` it now or later."""
        with self._lock:
            answer = self.rule(operation)
            if answer is HOLD:
                self.held.append(operation)
                return
        self.finish(operation, answer)

    def finish(self, operation: Operation, answer: int | Short | None) -> None:
        """Do the operation as `answer` says, and reply."""
        if isinstance(answer, int):
            self._reply(operation.unique, b"", answer)
            return
        start, size = operation.offset, min(answer.size, operation.size) if answer else operation.size
        end = min(start + size, len(self.content))
        if operation.kind == "read":
            with memoryview(self.content) as view:
                self._reply(operation.unique, bytes(view[start:end]))
        elif operation.kind == "write":
            self.content[start:end] = operation.data[: end - start]
            self._reply(operation.unique, struct.pack("<II", end - start, 0))
        else:
            if operation.kind == "allocate":
                self.content[start:end] = bytes(max(0, end - start))
            self._reply(operation.unique)

    def _reply(self, unique: int, body: bytes = b"", error: int = 0) -> None:
        # ENOENT: the request was interrupted, or the file system was unmounted.
        with contextlib.suppress(FileNotFoundError):
            os.write(self._fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body)

    def _answer_about_files(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        if opcode == INIT:
            flags = ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | (WRITEBACK_CACHE if self._write_back else 0)
            major, _, read_ahead, offered = struct.unpack_from("<4I", body)
            pages = MAX_WRITE // 4096
            limits = (BACKGROUND, BACKGROUND * 3 // 4, MAX_WRITE, 1, pages)
            self._reply(unique, struct.pack("<4IHHIIHH32x", major, 31, read_ahead, flags & offered, *limits, 0))
        elif opcode == LOOKUP:
            if body.rstrip(b"\0") != NAME.encode():
                self._reply(unique, error=errno.ENOENT)
            else:
                self._reply(unique, struct.pack("<4Q2I", FILE, 0, 3600, 0, 0, 0) + self._attributes(FILE))
        elif opcode in (GETATTR, SETATTR):
            if opcode == SETATTR and struct.unpack_from("<I", body)[0] & FATTR_SIZE:
                (size,) = struct.unpack_from("<Q", body, 16)
                self.content[size:] = bytes(max(0, size - len(self.content)))
            self._reply(unique, struct.pack("<Q2I", 0, 0, 0) + self._attributes(node))
        elif opcode == OPEN:
            refused = self.open_rule(struct.unpack_from("<I", body)[0])
            self._reply(unique, b"" if refused else struct.pack("<QII", 1, 0, 0), refused)
        elif opcode == STATFS:
            self._reply(unique, struct.pack("<5Q4I24x", 1 << 20, 1 << 19, 1 << 19, 1, 1, 4096, 255, 4096, 0))
        elif opcode in (RELEASE, DESTROY):
            self._reply(unique)
        elif opcode == FALLOCATE:
            self._reply(unique, error=errno.EOPNOTSUPP)
        else:
            self._reply(unique, error=errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode, size = (stat.S_IFDIR | 0o755, 0) if node == ROOT else (stat.S_IFREG | 0o600, len(self.content))
        times = (0, 0, 0, 0, 0, 0)
        return ATTRIBUTES.pack(node, size, -(-size // 512), *times, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)


File = TypeVar("File", bound=FuseFile)


@contextlib.contextmanager
def mounted(file: File) -> Iterator[File]:
    """Keep the file system mounted during the block."""
    try:
        yield file
    finally:
        file.close()
