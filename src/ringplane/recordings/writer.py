"""Writes recordings from Python: parts of others, and those of tests."""

from __future__ import annotations

from typing import BinaryIO

from ringplane.recordings.entries import END, MARK, Header
from ringplane.recordings.recording_format import HEAD_FIELDS, pack_header, padded, sealed


class RecordingWriter:
    """Appends to a file, which stays the caller's. Its methods raise OSError."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file = file
        # The number of entries so far.
        self.count = 0
        file.write(pack_header(header))

    def add(self, kind: int, *, data: bytes | bytearray | memoryview = b"", **fields: int) -> int:
        """Append an entry; returns its index.

        `fields` are those of Entry. By default nothing else was in flight, and the length is that of the data.
        """
        data = memoryview(data).cast("B")
        given = {"began": self.count, "length": len(data)} | fields
        given |= {"kind": kind, "index": self.count, "size": len(data)}
        self._file.write(sealed(*(given.get(name, 0) for name in HEAD_FIELDS[:-1])))
        self._file.write(data)
        self._file.write(bytes(padded(len(data)) - len(data)))
        self.count += 1
        return self.count - 1

    def mark(self, text: str, **fields: int) -> int:
        """Append a mark; returns its index."""
        return self.add(MARK, data=text.encode(), **fields)

    def end(self) -> None:
        """Nothing is missing. It is the last call."""
        self.add(END)
