"""The handshake with an NBD server: fixed newstyle, NBD_OPT_GO or NBD_OPT_EXPORT_NAME, structured replies if offered.

A server is not trusted: every length is checked before that many bytes are read, and replies are counted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Protocol

from ringplane.block.sources.nbd.protocol import (
    FLAG_CAN_MULTI_CONN,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    FLAG_READ_ONLY,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    LARGEST_PAYLOAD,
    LONGEST_STRING,
    MAGIC,
    OLD_MAGIC,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_STRUCTURED_REPLY,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK,
    REP_ACK,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_FLAG_ERROR,
    REP_INFO,
    SMALLEST_BLOCK,
)

GREETING, OPTION, OPTION_REPLY = struct.Struct(">8sQH"), struct.Struct(">QII"), struct.Struct(">QIII")
EXPORT, BLOCK_SIZES = struct.Struct(">QH"), struct.Struct(">III")
# After the reply to NBD_OPT_EXPORT_NAME, unless both sides have NO_ZEROES.
ZEROES = 124

# Of one option: what real servers send is far less.
MOST_REPLIES, LONGEST_REPLY = 64, 2 * LONGEST_STRING

LARGEST_EXPORT, LARGEST_BLOCK = (1 << 63) - (1 << 16), 1 << 16

ERRORS = {
    REP_ERR_POLICY: "refuses this client; its configuration or its log says why",
    REP_ERR_TLS_REQD: "requires TLS, which is not supported; use a tunnel",
    REP_ERR_UNKNOWN: "has no such export; `qemu-nbd --list` shows its exports",
    REP_ERR_SHUTDOWN: "is being shut down; start it again",
}


class HandshakeError(Exception):
    """The server cannot be used; the text is the rest of a sentence about it."""


class Silent(HandshakeError):
    """It does not answer in time."""


class Stream(Protocol):
    """The bytes of a connection. Both methods raise HandshakeError if the peer takes too long or closes it."""

    def read(self, size: int) -> bytes: ...

    def write(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says of an export. Sizes in bytes; `largest` is that of a payload."""

    size: int
    flags: int
    smallest: int = SMALLEST_BLOCK
    preferred: int = PREFERRED_BLOCK
    largest: int = LARGEST_PAYLOAD
    structured: bool = False

    @property
    def read_only(self) -> bool:
        return bool(self.flags & FLAG_READ_ONLY)

    @property
    def many_connections(self) -> bool:
        """Whether several connections may be used, because a flush of one is a flush of all."""
        return bool(self.flags & FLAG_CAN_MULTI_CONN)


def negotiate(stream: Stream, name: str) -> Export:
    """Choose the export of this name; the transmission can begin then. Raises HandshakeError."""
    magic, kind, flags = GREETING.unpack(stream.read(GREETING.size))
    if magic != MAGIC or kind not in (OPTION_MAGIC, OLD_MAGIC):
        raise HandshakeError("is not an NBD server; check the address")
    if kind == OLD_MAGIC or not flags & FLAG_FIXED_NEWSTYLE:
        raise HandshakeError("speaks an old version of NBD, without fixed newstyle negotiation; use a newer server")
    no_zeroes = flags & FLAG_NO_ZEROES
    stream.write(struct.pack(">I", FLAG_FIXED_NEWSTYLE | no_zeroes))
    _write_option(stream, OPT_STRUCTURED_REPLY)
    structured = _read_reply(stream, OPT_STRUCTURED_REPLY)[0] == REP_ACK
    export = _go(stream, name.encode(), structured)
    return export or _by_name(stream, name.encode(), structured, 0 if no_zeroes else ZEROES)


def _write_option(stream: Stream, option: int, data: bytes = b"") -> None:
    stream.write(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)


def _read_reply(stream: Stream, option: int) -> tuple[int, bytes]:
    """Type and data of one reply."""
    magic, replied, kind, length = OPTION_REPLY.unpack(stream.read(OPTION_REPLY.size))
    if magic != OPTION_REPLY_MAGIC or replied != option:
        raise HandshakeError("sent garbage during the handshake")
    if length > LONGEST_REPLY:
        raise HandshakeError(f"sent a reply of {length} bytes during the handshake")
    return kind, stream.read(length)


def _go(stream: Stream, name: bytes, structured: bool) -> Export | None:
    """By NBD_OPT_GO; None: the server does not support it."""
    request = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_BLOCK_SIZE)
    _write_option(stream, OPT_GO, request)
    found: dict[str, Any] = {}
    for _ in range(MOST_REPLIES):
        kind, data = _read_reply(stream, OPT_GO)
        if kind == REP_INFO:
            found |= _information(data)
        elif kind == REP_ACK:
            return _checked(found, structured)
        elif kind == REP_ERR_UNSUP:
            return None
        elif kind & REP_FLAG_ERROR:
            raise HandshakeError(_in_words(kind, data))
        else:
            raise HandshakeError("sent garbage during the handshake")
    raise HandshakeError("does not end its information about the export")


def _by_name(stream: Stream, name: bytes, structured: bool, zeroes: int) -> Export:
    """By NBD_OPT_EXPORT_NAME: a server without such an export closes the connection."""
    _write_option(stream, OPT_EXPORT_NAME, name)
    size, flags = EXPORT.unpack(stream.read(EXPORT.size))
    stream.read(zeroes)
    return _checked({"size": size, "flags": flags}, structured)


def _information(data: bytes) -> dict[str, int]:
    """Fields of Export from the data of an NBD_REP_INFO."""
    kind, rest = int.from_bytes(data[:2], "big"), data[2:]
    if len(data) >= 2 and kind == INFO_EXPORT and len(rest) == EXPORT.size:
        return dict(zip(("size", "flags"), EXPORT.unpack(rest), strict=True))
    if len(data) >= 2 and kind == INFO_BLOCK_SIZE and len(rest) == BLOCK_SIZES.size:
        return dict(zip(("smallest", "preferred", "largest"), BLOCK_SIZES.unpack(rest), strict=True))
    if len(data) < 2 or kind in (INFO_EXPORT, INFO_BLOCK_SIZE):
        raise HandshakeError("sent information about the export that has a wrong length")
    return {}


def _checked(found: dict[str, int], structured: bool) -> Export:
    if "size" not in found:
        raise HandshakeError("did not send the size of the export")
    export = Export(**found, structured=structured)
    if not 0 < export.size <= LARGEST_EXPORT:
        raise HandshakeError(f"has an export of {export.size} bytes, which cannot be served")
    if not (_is_block(export.smallest) and _is_block(export.preferred, 1 << 31)) or not (
        export.smallest <= export.preferred <= export.largest
    ):
        raise HandshakeError(
            f"sent impossible block sizes: {export.smallest}, {export.preferred}, {export.largest} bytes"
        )
    return export


def _is_block(size: int, largest: int = LARGEST_BLOCK) -> bool:
    return 0 < size <= largest and size & (size - 1) == 0


def _in_words(kind: int, message: bytes) -> str:
    said = message.decode(errors="replace")[:200]
    said = "".join(character for character in said if character.isprintable()).strip()
    what = ERRORS.get(kind, f"refuses the export (error {kind - REP_FLAG_ERROR})")
    return f"{what} (it says: {said})" if said else what
