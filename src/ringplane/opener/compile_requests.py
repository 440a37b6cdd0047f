"""The messages between a process and the one that compiles policies for it; their socket keeps their boundaries.

First the small process sends READY, and gets the setup. Then each request is one message, and its answer too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ringplane.opener.open_requests import LONGEST_PATH, is_relative

READY = b"ready"

# Functions of C's library that policies may call, whose addresses are in the setup.
C_FUNCTIONS = (
    *("aligned_alloc", "memcpy", "memmove", "memset"),
    *("fmod", "pow", "exp", "log", "floor", "ceil", "trunc", "rint"),
)
# The address of the code window in the other process, and of these. Texts follow, with zeros between: the module that
# compiles, and the folders that Python imports from.
SETUP = struct.Struct(f"={1 + len(C_FUNCTIONS)}Q")
LONGEST_SETUP = 1 << 16

# Number; number of the folder; digest of the text that is known. The path below the folder, a zero, and the name of the
# policy follow. SHIPPED: no folder and no path, it is one that ships.
REQUEST = struct.Struct("=IH8s")
LONGEST_NAME = 255
LONGEST_REQUEST = REQUEST.size + LONGEST_PATH + 1 + LONGEST_NAME
SHIPPED = 0xFFFF

# Number; what has become of it; where the code is in the window; its size. A text follows.
ANSWER = struct.Struct("=IiII")
# A file that cannot be opened has its errno instead.
MADE, UNCHANGED, REFUSED, TOO_LARGE, TOO_LONG, NO_ROOM = 0, -1, -2, -3, -4, -5
LONGEST_TEXT = 1 << 17
LONGEST_ANSWER = ANSWER.size + LONGEST_TEXT

# Of a file of policies, in bytes.
LARGEST_FILE = 1 << 18


class Request:
    """The policy `name` of a file below a folder. A file whose text has the digest `known` is not compiled."""

    __slots__ = ("folder", "known", "name", "path")

    def __init__(self, folder: int, path: bytes, name: bytes, known: bytes) -> None:
        self.folder, self.path, self.name, self.known = folder, path, name, known

    def packed(self, number: int) -> bytes:
        """The message with this number."""
        return REQUEST.pack(number, self.folder, self.known) + self.path + b"\0" + self.name


def parsed(message: bytes, folders: int) -> tuple[int, Request]:
    """The number and the request of a message from a process that is not trusted, which may use so many folders.

    Raises ValueError for a message that our end never sends.
    """
    if not REQUEST.size < len(message) <= LONGEST_REQUEST:
        raise ValueError("not the size of a request")
    number, folder, known = REQUEST.unpack_from(message)
    path, zero, name = message[REQUEST.size :].partition(b"\0")
    right = not path and name if folder == SHIPPED else folder < folders and is_relative(path) and path.endswith(b".py")
    if not zero or not right or len(name) > LONGEST_NAME or b"\0" in name:
        raise ValueError("not a request")
    name.decode()
    return number, Request(folder, path, name, known)


def packed_setup(addresses: Sequence[int], texts: Sequence[str]) -> bytes:
    """The setup. Raises UnicodeEncodeError."""
    return SETUP.pack(*addresses) + "\0".join(texts).encode()


def parsed_setup(message: bytes) -> tuple[list[int], list[str]]:
    """The addresses and the texts of a setup."""
    return list(SETUP.unpack_from(message)), message[SETUP.size :].decode().split("\0")
