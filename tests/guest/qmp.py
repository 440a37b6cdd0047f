"""The part of QEMU's machine protocol (QMP) that the tests need."""

import json
import socket
import time
from pathlib import Path
from typing import Any

PATIENCE = 30.0


class Qmp:
    """A connection to a QEMU that was started with `-qmp unix:PATH,server=on,wait=off`."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: object) -> Any:
        """Run a command and return its result; AssertionError if it fails."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()
