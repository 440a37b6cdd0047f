"""Runs checks on all CPUs: a process per CPU, each with a view of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ringplane.crash.check_process import NOT_EXECUTED, Experiment, Verdict, main, task_of
from ringplane.crash.crash_states import State
from ringplane.system.descendants import adopt_descendants, children, end_descendants
from ringplane.system.signals import Signals, name

# How often signals are looked for, in seconds.
TICK = 0.2
# Seconds until a process has ended that was asked to.
PATIENCE = 10.0


class CouldNotRun(Exception):
    """States cannot be tried; the text is one line for users."""


class CheckProcesses:
    """The processes by connection. They end when these are closed. Methods raise CouldNotRun, Interrupted."""

    def __init__(self, processes: Mapping[Connection, BaseProcess], signals: Signals) -> None:
        self._processes, self._signals = processes, signals

    def wait_until_ready(self) -> None:
        for connection in self._processes:
            self._signals.wait(connection.fileno())
            if wrong := self._received(connection):
                raise CouldNotRun(str(wrong))

    def verdicts(self, states: Iterable[State]) -> Iterator[tuple[State, Verdict]]:
        """Try these states; the verdicts come in any order, and all of them have to be taken."""
        coming, free = iter(states), list(self._processes)
        running: dict[Connection, State] = {}
        while True:
            while free and (state := next(coming, None)) is not None:
                running[free[-1]] = state
                self._send(free.pop(), state)
            if not running:
                return
            for connection in wait(list(running), TICK):
                assert isinstance(connection, Connection)
                free.append(connection)
                verdict = self._verdict(connection)
                # A signal may have ended the check too, with the same verdict as if it had failed.
                self._signals.check()
                yield running.pop(connection), verdict
            self._signals.check()

    def _send(self, connection: Connection, state: State) -> None:
        try:
            connection.send(task_of(state))
        except OSError:
            raise self._ended(connection) from None

    def _verdict(self, connection: Connection) -> Verdict:
        verdict = self._received(connection)
        if not isinstance(verdict, Verdict):
            raise CouldNotRun(str(verdict))
        if verdict.status in NOT_EXECUTED:
            raise CouldNotRun(f"the check cannot be executed: {verdict.output.strip() or verdict.status}")
        return verdict

    def _received(self, connection: Connection) -> object:
        try:
            return connection.recv()
        except (EOFError, OSError):
            raise self._ended(connection) from None

    def _ended(self, connection: Connection) -> CouldNotRun:
        """Why a process has ended. Raises Interrupted if this one was asked to end too."""
        self._signals.check()
        process = self._processes[connection]
        process.join(PATIENCE)
        if process.exitcode is not None and process.exitcode < 0:
            return CouldNotRun(f"a process that runs checks was ended by {name(-process.exitcode)}")
        return CouldNotRun("a process that runs checks has ended unexpectedly; what it printed is above")


@contextlib.contextmanager
def check_processes(experiment: Experiment, number: int, signals: Signals) -> Iterator[CheckProcesses]:
    """So many processes, during the block. Raises CouldNotRun, Interrupted."""
    # They inherit what has been read: nothing is copied.
    context = multiprocessing.get_context("fork")
    # If one of them is killed, what its check has started is left to this process.
    adopt_descendants()
    others = children()
    processes: dict[Connection, BaseProcess] = {}
    with tempfile.TemporaryDirectory(prefix="ringplane-crash-") as folder:
        try:
            for _ in range(number):
                ours, its = context.Pipe()
                arguments = experiment, Path(folder), its, [*processes, ours]
                process = context.Process(target=main, args=arguments, daemon=True)
                process.start()
                its.close()
                processes[ours] = process
            running = CheckProcesses(processes, signals)
            running.wait_until_ready()
            yield running
        finally:
            _end(processes)
            end_descendants(spared=others)


def _end(processes: Mapping[Connection, BaseProcess]) -> None:
    """They end when their connections are closed, and kill their checks. One that does not end in time is killed."""
    for connection in processes:
        connection.close()
    end = time.monotonic() + PATIENCE
    for process in processes.values():
        process.join(max(0, end - time.monotonic()))
        process.kill()
        process.join(PATIENCE)


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0))
