"""A process that runs the check on one state after the other: it shows a view of a state, and starts the command.

It has a mount namespace of its own. So its view disappears with it, however it ends, and all views have the same path.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from ringplane.crash.check_command import Shell
from ringplane.crash.crash_states import State
from ringplane.crash.image_view import View
from ringplane.crash.mounted_view import MountedView
from ringplane.crash.power_cuts import PowerCut
from ringplane.crash.sector_contents import SectorContents
from ringplane.crash.timeline import Timeline
from ringplane.system.descendants import adopt_descendants
from ringplane.system.mount_namespace import enter_mount_namespace, is_mounted_below
from ringplane.system.signals import ENDING

# Exit statuses of a shell that could not execute a command.
NOT_EXECUTED = (126, 127)

# What COMMAND may contain: the path of the image; that of an empty folder, which is removed afterwards; and the text of
# the last mark.
IMAGE, FOLDER, MARK = "{image}", "{folder}", "{mark}"
PLACEHOLDERS = re.compile("|".join(map(re.escape, (IMAGE, FOLDER, MARK))))


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
    """How a check ended: its exit status, or None if its time was over; and, if it failed, what it printed last.

    `detached`: loop devices that it had left.
    """

    status: int | None
    output: str
    detached: int = 0

    @property
    def failed(self) -> bool:
        return self.status != 0


# A state as it is sent: the number of its cut, and the rest of it.
Task = tuple[int, tuple[int, ...], tuple[int, ...]]


def task_of(state: State) -> Task:
    return state.cut.number, state.kept, state.order


def main(experiment: Experiment, folder: Path, connection: Connection, others: Sequence[Connection]) -> NoReturn:
    """The process. It sends "" when it is ready, or what is wrong; then a Verdict for each Task, or what is wrong.

    `others` are the parent's ends of connections: they are closed here, to be closed when the parent has ended.
    """
    status = 1
    try:
        for other in others:
            other.close()
        # What has been read stays shared: the garbage collector would write to it.
        gc.freeze()
        _separate()
        checker = Checker(experiment, folder, connection)
        connection.send("")
        checker.run()
        status = 0
    except OSError as error:
        with contextlib.suppress(OSError):
            connection.send(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _separate() -> None:
    """Signals of the terminal are for the process that started this one."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    enter_mount_namespace()
    adopt_descendants()


class Checker:
    """Runs checks for the process at the other end of a connection, until it closes it. Raises OSError."""

    def __init__(self, experiment: Experiment, folder: Path, connection: Connection) -> None:
        self._experiment, self._connection = experiment, connection
        self._view = MountedView(View(experiment.contents), folder)
        # There is no next task before the verdict.
        self._shell = Shell(connection.fileno())

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
        with self._command(state) as command:
            status = self._shell.run(command, self._experiment.time_limit)
        detached = self._view.close()
        return Verdict(status, self._shell.printed() if status != 0 else "", len(detached))

    @contextlib.contextmanager
    def _command(self, state: State) -> Iterator[str]:
        mark = self._experiment.timeline.mark_before(state.cut.time)
        values = {IMAGE: str(self._view.path), MARK: mark.text if mark else ""}
        with contextlib.ExitStack() as stack:
            if FOLDER in self._experiment.command:
                values[FOLDER] = str(stack.enter_context(empty_folder()))
            yield PLACEHOLDERS.sub(lambda found: shlex.quote(values[found[0]]), self._experiment.command)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder during the block. It is removed, but nothing that is mounted there. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix="ringplane-check-")).resolve()
    try:
        yield folder
    finally:
        if is_mounted_below(folder):
            raise OSError(errno.EBUSY, "something is still mounted there", str(folder))
        shutil.rmtree(folder, ignore_errors=True)
