"""Compiling side by side: a process per CPU, each of which takes the next of the jobs until there are none."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from ringplane.compiler.bad_code import BadCode
from ringplane.system.libc import end_with_parent

# The exit status of a process that has found a mistake in the code; the last line of its output says which.
BAD_CODE = 3

Job = Callable[[], object]


def work_off(first: Job, jobs: Sequence[Job]) -> None:
    """Do the first job in this process and the others beside it; the longest of these should come first.

    What a job compiles is in the cache then. Raises BadCode, which ends the other jobs: one of the first job if that
    finds mistakes, because only this process raises its own. Raises SystemExit if another process failed. This process
    must have no threads.
    """
    # A pipe with the numbers of the jobs: each is read once.
    taken, given = os.pipe()
    os.write(given, bytes(range(len(jobs))))
    os.close(given)
    # One with the mistakes that other processes find.
    found, report = os.pipe()
    others = min(len(os.sched_getaffinity(0)) - 1, len(jobs))
    children = [pid for _ in range(others) if (pid := _fork(jobs, taken, report))]
    os.close(report)
    try:
        first()
        _take_jobs(jobs, taken)
    except BaseException:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        os.close(taken)
        mistake = os.read(found, select.PIPE_BUF).decode(errors="replace")
        os.close(found)
    if mistake:
        raise BadCode(mistake)
    for status in filter(None, statuses):
        sys.exit(status)


def _take_jobs(jobs: Sequence[Job], taken: int) -> None:
    while number := os.read(taken, 1):
        jobs[number[0]]()


def _fork(jobs: Sequence[Job], taken: int, report: int) -> int:
    """The process ID of one more process; 0 if it cannot be started: the others do its work."""
    sys.stdout.flush()
    try:
        pid = os.fork()
    except OSError:
        return 0
    if pid == 0:
        os._exit(_status_of(lambda: _take_jobs(jobs, taken), report))
    return pid


def _status_of(work: Callable[[], None], report: int) -> int:
    end_with_parent()
    try:
        work()
    except BadCode as error:
        os.write(report, str(error).encode()[: select.PIPE_BUF])
        return BAD_CODE
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
