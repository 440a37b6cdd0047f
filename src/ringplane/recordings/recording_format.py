"""How a recording is stored; docs/recordings.md describes it for others.

All numbers are little-endian and have 64 bits, so compiled code writes an entry as a struct of int64.

    magic, version, length of the JSON text; the text; zeros up to a multiple of 8 bytes; the entries

An entry is a HEAD, followed by its data and zeros up to a multiple of 8 bytes. The last field of the HEAD is such that
the XOR of all its fields is SEAL: where the file was not written to its end, there is no HEAD.
"""

from __future__ import annotations

import dataclasses
import struct
from functools import reduce
from operator import xor
from typing import Any

from ringplane.recordings.entries import Header

MAGIC = b"ringrec\0"
VERSION = 1
# The bytes "ringrec!".
SEAL = 0x2163_6572_676E_6972

START = struct.Struct("<8sqq")

# `size` is the number of bytes of data behind it.
HEAD_FIELDS = (
    *("kind", "index", "began", "begin_ns", "end_ns", "offset", "length", "flags", "result", "queue", "size"),
    "seal",
)
HEAD = struct.Struct(f"<{len(HEAD_FIELDS)}q")
NUMBER = struct.Struct("<q")
ALIGNMENT = 8

# No header is larger: a name and a path.
MAX_JSON = 1 << 20

# Why none is written to a path.
EXISTS = (
    "{}: exists already, and no recording is overwritten; remove it, or name another file: with {{time}} in its name "
    "each start makes a new one"
)


class RecordingError(Exception):
    """The file is not a recording that can be read; the text is one line for users."""


def padded(size: int) -> int:
    """The same in whole multiples of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def sealed(*fields: int) -> bytes:
    """A HEAD with these fields."""
    return HEAD.pack(*fields, reduce(xor, fields, SEAL))


def is_sealed(fields: tuple[int, ...]) -> bool:
    """Whether these are the fields of a HEAD."""
    return reduce(xor, fields) == SEAL


def pack_header(header: Header) -> bytes:
    """The beginning of the file."""
    # Processes that record nothing import this module too.
    import json

    text = json.dumps(dataclasses.asdict(header)).encode()
    return START.pack(MAGIC, VERSION, len(text)) + text.ljust(padded(len(text)), b"\0")


def unpack_header(content: memoryview) -> tuple[Header, int]:
    """The header, and where the entries begin. Raises RecordingError."""
    start = bytes(content[: START.size])
    if len(start) < START.size or not start.startswith(MAGIC):
        raise RecordingError("this is not a recording of ringplane")
    _, version, length = START.unpack(start)
    if version != VERSION:
        raise RecordingError(f"the recording has version {version}, and this ringplane reads version {VERSION}")
    text = bytes(content[START.size : START.size + max(0, min(length, MAX_JSON))])
    if len(text) != length:
        raise RecordingError("the recording ends before its first entry")
    return _header_of(text), START.size + padded(length)


def _header_of(text: bytes) -> Header:
    """Later versions may add fields, which are ignored."""
    import json

    try:
        found: dict[str, Any] = json.loads(text)
        fields = {field.name: field for field in dataclasses.fields(Header)}
        header = Header(**{name: value for name, value in found.items() if name in fields})
        _check(header)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise RecordingError("the header of the recording is damaged") from None
    return header


def _check(header: Header) -> None:
    """Raises ValueError unless all fields have the right types and values."""
    for field in dataclasses.fields(Header):
        if type(getattr(header, field.name)).__name__ != field.type:
            raise ValueError(field.name)
    sizes = header.size, header.block_size, header.physical_block_size
    if not (0 <= header.size < 1 << 63 and min(sizes[1:]) > 0):
        raise ValueError(sizes)
