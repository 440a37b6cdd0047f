"""Files of recordings whose storage hangs: requests wait for it when there is no more room, and the log says so."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Protocol

from ringplane.log.event_bus import Emit

log = logging.getLogger(__name__)

# Seconds without an answer after which that is reported.
LONGEST_SILENCE = 10.0


class File(Protocol):
    """What is watched of a RecordingFile."""

    path: Path
    failed: str

    @property
    def disk(self) -> str: ...

    @property
    def taken(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def room(self) -> int: ...


class FileSlowness:
    """Of one file, as far as it was reported."""

    def __init__(self, file: File, emit: Emit) -> None:
        self._file, self._emit = file, emit
        self._taken, self._since = -1, 0.0
        self._reported = False

    def look(self) -> None:
        """Report that the file takes nothing, or that it does again."""
        now, file = time.monotonic(), self._file
        if file.taken != self._taken or not file.waiting or file.failed:
            self._taken, self._since = file.taken, now
        silence = now - self._since
        if silence >= LONGEST_SILENCE and not self._reported:
            self._report_silence(silence)
        elif silence < LONGEST_SILENCE and self._reported and not file.failed:
            self._log(logging.INFO, "%s: the storage of the recording answers again", file.path)
            self._emit("recording-continues", file=str(file.path))
        self._reported = silence >= LONGEST_SILENCE

    def _report_silence(self, silence: float) -> None:
        file = self._file
        self._log(
            logging.WARNING,
            "%s: the storage of the recording has not answered for %d s: %d bytes wait for it, and the guest waits "
            "when %d do; `ringplane ctl end-recording %s` has it continue without them",
            *(file.path, silence, file.waiting, file.room, file.disk),
        )
        self._emit("recording-waits", file=str(file.path), waiting=file.waiting)

    def _log(self, level: int, message: str, *words: object) -> None:
        log.log(level, message, *words, extra={"disk": self._file.disk})
