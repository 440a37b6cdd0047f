"""A process that runs the check on one state after the other: it shows a view of a state, and starts the command.

It has a mount namespace of its own. So its view disappears with it, however it ends, and all views have the same path.
Each command has one too: this process, which removes the folder of the command, never sees what is mounted there.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from ringplane.crash.crash_states import State
from ringplane.crash.disk_state import DiskState
from ringplane.crash.image_view import View, mount
from ringplane.crash.power_cuts import PowerCut
from ringplane.crash.sector_contents import SectorContents
from ringplane.crash.timeline import Timeline
from ringplane.system.descendants import adopt_descendants, end_descendants, end_with_parent
from ringplane.system.mount_namespace import copy_mount_namespace, enter_mount_namespace
from ringplane.system.signals import ENDING

# Of what a failed check has printed the end is kept, in bytes.
MOST_OUTPUT = 4096

# Exit statuses of a shell that could not execute a command.
NOT_EXECUTED = (126, 127)

# What COMMAND may contain: the path of the image; that of an empty folder, which is removed afterwards; and the text of
# the last mark.
IMAGE, FOLDER, MARK = "{image}", "{folder}", "{mark}"


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is tried: the states of these cuts, with a shell command as check."""

    contents: SectorContents
    timeline: Timeline
    cuts: list[PowerCut]
    command: str
    time_limit: float

    @property
    def uses_marks(self) -> bool:
        """Whether the result depends on the last mark, and not on the image alone."""
        return MARK in self.command

    def marked(self, state: State) -> int:
        """How many entries had ended with the last mark, if the check uses it: it is promised that far."""
        mark = self.timeline.mark_before(state.cut.time) if self.uses_marks else None
        return mark.index + 1 if mark else 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a check ended: its exit status, or None if its time was over; and, if it failed, what it printed last."""

    status: int | None
    output: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status != 0


# A state as it is sent: the number of its cut, and the rest of it.
Task = tuple[int, tuple[int, ...], tuple[int, ...]]


def task_of(state: State) -> Task:
    return state.cut.number, state.kept, state.order


def main(experiment: Experiment, folder: Path, connection: Connection, others: Sequence[Connection]) -> NoReturn:
    """The process. It sends "" when it is ready, or what is wrong; then a Verdict for each Task.

    `others` are the parent's ends of connections: they are closed here, to be closed when the parent has ended.
    """
    status = 1
    try:
        for other in others:
            other.close()
        _separate()
        checker = Checker(experiment, folder, connection)
        connection.send("")
        checker.run()
        status = 0
    except OSError as error:
        with contextlib.suppress(OSError):
            connection.send(f"{error.filename or folder}: {error.strerror}")
    finally:
        os._exit(status)


def _separate() -> None:
    """Signals of the terminal are for the process that started this one."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    enter_mount_namespace()
    adopt_descendants()


def _separate_command() -> None:
    """In the child process, before it executes the shell."""
    end_with_parent()
    copy_mount_namespace()


class Checker:
    """Runs checks for the process at the other end of a connection, until it closes it. Raises OSError."""

    def __init__(self, experiment: Experiment, folder: Path, connection: Connection) -> None:
        self._experiment, self._connection = experiment, connection
        self._view = View(DiskState(experiment.contents, experiment.timeline))
        self._mounted = mount(self._view, folder)
        self._output = os.memfd_create("output", os.MFD_CLOEXEC)

    def run(self) -> None:
        """Until the other end is closed."""
        while True:
            try:
                number, kept, order = self._connection.recv()
            except EOFError:
                return
            self._connection.send(self._verdict(State(self._experiment.cuts[number], kept, order)))

    def _verdict(self, state: State) -> Verdict:
        self._view.show(state)
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        with self._command(state) as command:
            begin = time.monotonic()
            status = self._run(command)
            seconds = time.monotonic() - begin
        return Verdict(status, self._printed() if status != 0 else "", seconds)

    @contextlib.contextmanager
    def _command(self, state: State) -> Iterator[str]:
        mark = self._experiment.timeline.mark_before(state.cut.time)
        command = self._experiment.command.replace(IMAGE, shlex.quote(str(self._mounted)))
        command = command.replace(MARK, shlex.quote(mark.text if mark else ""))
        if FOLDER not in command:
            yield command
            return
        folder = tempfile.mkdtemp(prefix="ringplane-check-")
        try:
            yield command.replace(FOLDER, shlex.quote(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, command: str) -> int | None:
        """The exit status of a shell, or None if its time was over; -n if signal n ended it."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
            preexec_fn=_separate_command,
        )
        ended = os.pidfd_open(process.pid)
        try:
            in_time = self._wait(ended)
        finally:
            os.close(ended)
            process.kill()
            status = process.wait()
            # Also what it has left in the background: it could write to the next state.
            end_descendants()
        return status if in_time else None

    def _wait(self, ended: int) -> bool:
        """Whether the command ended in time. Raises BrokenPipeError if the other end of the connection has gone."""
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        # There is no next task before the verdict.
        poll.register(self._connection.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll(self._experiment.time_limit * 1000)}
        if self._connection.fileno() in ready:
            raise BrokenPipeError
        return ended in ready

    def _printed(self) -> str:
        """The end of what the command printed."""
        size = os.fstat(self._output).st_size
        return os.pread(self._output, MOST_OUTPUT, max(0, size - MOST_OUTPUT)).decode("utf-8", "replace")
