"""Runs the commands of checks one after the other: nothing of one is left when the next one runs."""

from __future__ import annotations

import os
import select
import signal

from ringplane.system.descendants import end_descendants
from ringplane.system.mount_namespace import CopiedMounts

# Of what a command has printed the end is kept, in bytes.
MOST_OUTPUT = 4096

# Signals that Python ignores, and commands should not.
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)


class Shell:
    """Each command is run by a shell, in a session of its own. Methods raise OSError, and belong to one thread.

    It has a mount namespace that this process does not use otherwise, so what it mounts is seen by nobody else. It is
    started without a copy of this process (posix_spawn(3)), which would take longer than most commands.
    """

    def __init__(self, caller: int) -> None:
        """A command ends early if something can be read from the fd `caller`, or its other end is closed."""
        self._caller = caller
        self._mounts = CopiedMounts()
        self._output = os.memfd_create("output", os.MFD_CLOEXEC)
        # Faster than `os.environ`, which decodes all of it each time.
        self._environment = dict(os.environ)

    def run(self, command: str, time_limit: float) -> int | None:
        """The exit status, or None if the time was over; -n if signal n ended it. Raises BrokenPipeError for `caller`.

        Also what it has left in the background has ended then, and what it has mounted has disappeared.
        """
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        child = self._start(command)
        try:
            in_time = self._wait(child, time_limit)
        finally:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            end_descendants()
            self._mounts.renew()
        return status if in_time else None

    def _start(self, command: str) -> int:
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            *((os.POSIX_SPAWN_DUP2, self._output, fd) for fd in (1, 2)),
        ]
        arguments = ["/bin/sh", "-c", command]
        return os.posix_spawn(
            *(arguments[0], arguments, self._environment),
            file_actions=streams,
            setsid=True,
            setsigmask=(),
            setsigdef=IGNORED,
        )

    def _wait(self, child: int, time_limit: float) -> bool:
        """Whether it ended in time."""
        ended = os.pidfd_open(child)
        try:
            poll = select.poll()
            for fd in (ended, self._caller):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(time_limit * 1000)}
        finally:
            os.close(ended)
        if self._caller in ready:
            raise BrokenPipeError
        return ended in ready

    def printed(self) -> str:
        """The end of what the command has printed."""
        size = os.fstat(self._output).st_size
        return os.pread(self._output, MOST_OUTPUT, max(0, size - MOST_OUTPUT)).decode("utf-8", "replace")
