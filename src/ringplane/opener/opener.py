"""What opens and creates files, and connects to servers: this process, or the one beside it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ringplane.opener.server_places import Place, connect
from ringplane.system import procfs

# Non-blocking, so that a FIFO is rejected instead of waited for; files and block devices ignore the flag.
NOT_WAITING = os.O_CLOEXEC | os.O_NONBLOCK


class OpenerEnded(Exception):
    """The process that opens files does not answer; the text is one line for the person who needs a file."""


class Compiled(NamedTuple):
    """What has become of a policy that was to be compiled (compile_requests.py).

    If it was, this is where its code is, of so many bytes; the text describes it, or says why it was not.
    """

    status: int
    address: int
    size: int
    text: str


class Compiler(Protocol):
    """What compiles policies."""

    def ask(self, folder: int, path: bytes, name: str, known: bytes) -> Compiled:
        """Have the policy `name` of a file below a folder compiled, unless its text has the digest `known`.

        Raises OpenerEnded.
        """


class Opener(Protocol):
    """Its methods raise OSError, and OpenerEnded. An fd is the caller's from then on."""

    @property
    def compiler(self) -> Compiler | None:
        """The process that compiles policies; None: there is none, or it is this process itself."""

    def allows(self, path: Path) -> bool:
        """Whether it may open this file."""

    def place(self, path: Path) -> tuple[int, bytes]:
        """For the compiler: the number of the folder that the file is below, and where it is there. Raises OSError."""

    def open(self, path: Path, *, read_only: bool, direct: bool) -> int:
        """The fd of the image at this path, with O_DIRECT if `direct`."""

    def open_again(self, fd: int, path: Path, *, direct: bool) -> int:
        """The fd of another open file of an open image, for reading and writing; maybe of what is at its path now."""

    def create(self, path: Path, size: int) -> None:
        """Create a sparse file of so many bytes, where nothing may be; a failure leaves nothing behind."""

    def store_name(self, path: Path) -> None:
        """Make the name of a file that was created and synced durable, if its file system has not done that."""

    def unlink(self, path: Path) -> None:
        """Remove one of the two files that were created last."""

    def reaches(self, server: Hashable) -> bool:
        """Whether images of this server may be added through it."""

    def places(self, server: Hashable) -> Sequence[Place]:
        """Where it connects to this server; none: it does not, or anywhere."""

    def connect(self, place: Place, patience: float) -> socket.socket:
        """A socket that connects there, or is connected, within so many seconds; BlockingIOError: try again."""


class LocalOpener:
    """This process itself."""

    compiler = None

    def allows(self, path: Path) -> bool:
        """See Opener."""
        return True

    def place(self, path: Path) -> tuple[int, bytes]:
        """See Opener."""
        raise OSError(errno.EXDEV, "there is no --allow-folder", str(path))

    def open(self, path: Path, *, read_only: bool, direct: bool) -> int:
        """See Opener."""
        access = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(path, NOT_WAITING | access | (os.O_DIRECT if direct else 0))

    def open_again(self, fd: int, path: Path, *, direct: bool) -> int:
        """See Opener: its path, which may be another file's by now, is used only without /proc."""
        named = procfs.open_file(fd)
        return self.open(named if named.exists() else path, read_only=False, direct=direct)

    def create(self, path: Path, size: int) -> None:
        """See Opener."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)

    def store_name(self, path: Path) -> None:
        """See Opener."""
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        """See Opener."""
        path.unlink()

    def reaches(self, server: Hashable) -> bool:
        """See Opener."""
        return False

    def places(self, server: Hashable) -> Sequence[Place]:
        """See Opener."""
        return ()

    def connect(self, place: Place, patience: float) -> socket.socket:
        """See Opener: this takes no time."""
        return connect(place)


LOCAL = LocalOpener()
