"""Runs checks on all CPUs: a process per CPU, each with a view of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ringplane.crash.check_process import NOT_EXECUTED, Experiment, Verdict, main, task_of
from ringplane.crash.crash_states import State
from ringplane.system.signals import Signals

# How often signals are looked for, in seconds.
TICK = 0.2


class CouldNotRun(Exception):
    """States cannot be tried; the text is one line for users."""


class CheckProcesses:
    """The processes. They end when their connections are closed."""

    def __init__(self, connections: list[Connection], signals: Signals) -> None:
        self._connections, self._signals = connections, signals

    def verdicts(self, states: Iterable[State]) -> Iterator[tuple[State, Verdict]]:
        """Try these states; the verdicts come in any order, and all of them have to be taken.

        Raises CouldNotRun, Interrupted.
        """
        coming, free = iter(states), list(self._connections)
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
                yield running.pop(connection), self._received(connection)
            self._signals.check()

    def _send(self, connection: Connection, state: State) -> None:
        try:
            connection.send(task_of(state))
        except OSError:
            raise CouldNotRun(ENDED) from None

    def _received(self, connection: Connection) -> Verdict:
        verdict = received(connection)
        if not isinstance(verdict, Verdict):
            raise CouldNotRun(str(verdict))
        if verdict.status in NOT_EXECUTED:
            raise CouldNotRun(f"the check cannot be executed: {verdict.output.strip() or verdict.status}")
        return verdict


ENDED = "a process that runs checks has ended unexpectedly; what it printed is above"


def received(connection: Connection) -> object:
    """What a process has sent. Raises CouldNotRun."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise CouldNotRun(ENDED) from None


@contextlib.contextmanager
def check_processes(experiment: Experiment, number: int, signals: Signals) -> Iterator[CheckProcesses]:
    """So many processes, during the block. Raises CouldNotRun."""
    # They inherit what has been read: nothing is copied.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ringplane-crash-") as name, contextlib.ExitStack() as stack:
        connections: list[Connection] = []
        for _ in range(number):
            ours, its = context.Pipe()
            connections.append(ours)
            process = context.Process(target=main, args=(experiment, Path(name), its, connections), daemon=True)
            process.start()
            its.close()
            stack.callback(process.join)
            stack.callback(ours.close)
        for connection in connections:
            if wrong := received(connection):
                raise CouldNotRun(str(wrong))
        yield CheckProcesses(connections, signals)


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0))
