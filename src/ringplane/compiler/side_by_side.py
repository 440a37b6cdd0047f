"""Compiling side by side: a process per CPU, each of which takes the next of the jobs until there are none."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ringplane.compiler.bad_code import BadCode
from ringplane.system.libc import end_with_parent

# The exit status of a process that has found a mistake in the code; the last line of its output says which.
BAD_CODE = 3

Job = Callable[[], object]


def work_off(jobs: Sequence[Job]) -> None:
    """Do all jobs; the longest should come first. Raises BadCode, or SystemExit if another process failed.

    What a job compiles is in the cache then. This process must have no threads.
    """
    # A pipe with the numbers of the jobs: each is read once.
    taken, given = os.pipe()
    os.write(given, bytes(range(len(jobs))))
    os.close(given)
    others = min(len(os.sched_getaffinity(0)), len(jobs)) - 1
    children = [pid for _ in range(others) if (pid := _fork(jobs, taken))]
    try:
        _take_jobs(jobs, taken)
    finally:
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        os.close(taken)
    for status in filter(None, statuses):
        sys.exit(status)


def _take_jobs(jobs: Sequence[Job], taken: int) -> None:
    while number := os.read(taken, 1):
        jobs[number[0]]()


def _fork(jobs: Sequence[Job], taken: int) -> int:
    """The process ID of one more process; 0 if it cannot be started: the others do its work."""
    sys.stdout.flush()
    try:
        pid = os.fork()
    except OSError:
        return 0
    if pid == 0:
        os._exit(_status_of(lambda: _take_jobs(jobs, taken)))
    return pid


def _status_of(work: Callable[[], None]) -> int:
    end_with_parent()
    try:
        work()
    except BadCode as error:
        print(error, flush=True)
        return BAD_CODE
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
