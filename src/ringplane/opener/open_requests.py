"""The messages between a process and the one that opens files for it, over a UNIX socket that keeps their boundaries.

A request is one message, and its answer too. An answer has the number of its request, so that one that comes too late
is recognised, the errno of what failed or 0, and the fd, if the request was for one. The first answer has the number 0:
the process is ready, or which folder could not be opened.
"""

from __future__ import annotations

import os
import struct

# In the arguments of the process: no user, no group; and the end of the places.
ABSENT = "-"

OPEN, CREATE, LISTEN, UNLINK, CONNECT = range(1, 6)

# How an image is opened.
READ_ONLY, DIRECT = 1, 2

# Number, kind, how it is opened, number of the folder, or of the place to connect to; size, mode, group. The path
# follows, if it is below a folder.
REQUEST = struct.Struct("=IBBHqqq")
# The bytes of a path (PATH_MAX of Linux, without the zero at its end).
LONGEST_PATH = 4095
LONGEST_REQUEST = REQUEST.size + LONGEST_PATH

# Number; errno; of the first answer also the number of the folder.
ANSWER = struct.Struct("=Iii")
READY = 0

# The end of the name of a file of policies.
POLICIES = b".py"

# The mode or group of a socket that is not set.
UNSET = -1
HIGHEST_MODE, HIGHEST_GROUP = 0o777, (1 << 32) - 2
LARGEST_SIZE = (1 << 63) - 1


class Request:
    """What is asked: `path` is relative to the folder of this number. CONNECT has the number of a place instead."""

    __slots__ = ("folder", "group", "how", "kind", "mode", "path", "size")

    def __init__(
        self,
        kind: int,
        folder: int,
        path: bytes,
        *,
        how: int = 0,
        size: int = 0,
        mode: int = UNSET,
        group: int = UNSET,
    ) -> None:
        self.kind, self.folder, self.path = kind, folder, path
        self.how, self.size, self.mode, self.group = how, size, mode, group

    def packed(self, number: int) -> bytes:
        """The message with this number."""
        return REQUEST.pack(number, self.kind, self.how, self.folder, self.size, self.mode, self.group) + self.path


def parsed(message: bytes, folders: int, places: int = 0) -> tuple[int, Request]:
    """The number and the request of a message from a process that is not trusted, which may use so many of both.

    Raises ValueError for a message that our end never sends.
    """
    if not REQUEST.size <= len(message) <= LONGEST_REQUEST:
        raise ValueError("not the size of a request")
    number, kind, how, folder, size, mode, group = REQUEST.unpack_from(message)
    request = Request(kind, folder, message[REQUEST.size :], how=how, size=size, mode=mode, group=group)
    known = folder < places and not request.path if kind == CONNECT else folder < folders and is_relative(request.path)
    if number == READY or not known or not _is_consistent(request):
        raise ValueError("not a request")
    return number, request


def _is_consistent(request: Request) -> bool:
    """Whether it is of a known kind, and has only what its kind needs."""
    if not is_readable_only(request):
        return False
    if request.kind == OPEN:
        allowed = request.how & ~(READ_ONLY | DIRECT) == 0
        return allowed and (request.size, request.mode, request.group) == (0, UNSET, UNSET)
    if request.how:
        return False
    if request.kind == LISTEN:
        return request.size == 0 and UNSET <= request.mode <= HIGHEST_MODE and UNSET <= request.group <= HIGHEST_GROUP
    wanted = request.size > 0 if request.kind == CREATE else request.kind in (UNLINK, CONNECT) and request.size == 0
    return wanted and (request.mode, request.group) == (UNSET, UNSET)


def is_readable_only(request: Request) -> bool:
    """Whether it is not to open or create a file of policies for writing.

    A guest that controls the other process must not write what is compiled for it (compiling_process.py).
    """
    writes = request.kind == CREATE or (request.kind == OPEN and not request.how & READ_ONLY)
    return not (writes and request.path.lower().endswith(POLICIES))


def is_relative(path: bytes) -> bool:
    """Whether a path leads down from its folder, name by name."""
    return b"\0" not in path and not any(name in (b"", b".", b"..") for name in path.split(b"/"))


def is_below_dev(folder: str | os.PathLike[str]) -> bool:
    """Whether block devices may be opened in this folder: whoever names one in /dev means them.

    /dev/shm is for the files of all users.
    """
    place = f"{os.path.realpath(folder)}/"
    return place.startswith("/dev/") and not place.startswith("/dev/shm/")
