"""An interactive shell on a terminal: the input can be commands, or keys for the running program."""

import contextlib
import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PATIENCE = 300.0


class Terminal:
    """bash on a pseudoterminal; background jobs write to it too. `text` is all output so far."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting"], {**environment, "PS1": "", "PS2": ""})
        self.text = ""
        self._commands = 0
        self.run("stty -echo")

    def run(self, command: str) -> str:
        """Type a command, wait until it ends with status 0, and return its output."""
        start = len(self.text)
        self.type(command + "\n")
        return self.finish(start)

    def finish(self, start: int) -> str:
        """Like `run`, for a command that was already typed when `text` had the length `start`."""
        # No other program may read the input at this time.
        self._wait(lambda: os.tcgetpgrp(self._fd) == self._pid, "the end of the command", start)
        self._commands += 1
        self.type(f'echo "ended-"{self._commands} $?\n')
        status = self.wait_for(rf"ended-{self._commands} (\d+)\r?\n", start)[1]
        assert status == "0", self.text[start:]
        return self.text[start:]

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, pattern: str, start: int) -> re.Match[str]:
        """Wait for a match in the text from `start` on."""
        sought = re.compile(pattern)
        self._wait(lambda: sought.search(self.text, start), repr(pattern), start)
        found = sought.search(self.text, start)
        assert found
        return found

    def _wait(self, condition: Callable[[], object], what: str, start: int) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{what} did not come in {PATIENCE:.0f} s:\n{self.text[start:]}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.text += os.read(self._fd, 65536).decode(errors="replace")

    def fileno(self) -> int:
        """Of the terminal's other end."""
        return self._fd

    def close(self) -> None:
        """Kill the shell and everything that it has started."""
        for job in self._jobs():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job, signal.SIGKILL)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)

    def _jobs(self) -> list[int]:
        """The process groups of the shell's children."""
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        return [os.getpgid(int(child)) for child in children]
