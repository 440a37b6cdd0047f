"""Recordings that tests make of entries."""

from __future__ import annotations

import io
from typing import Any

from ringplane.recordings.entries import Header
from ringplane.recordings.reader import Recording
from ringplane.recordings.writer import RecordingWriter


def recording_of(header: Header, *entries: dict[str, Any]) -> Recording:
    """A whole recording; each entry is the arguments of RecordingWriter.add."""
    file = io.BytesIO()
    writer = RecordingWriter(file, header)
    for entry in entries:
        writer.add(**entry)
    writer.end()
    return Recording(memoryview(file.getvalue()))
