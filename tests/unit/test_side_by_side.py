"""Jobs side by side: which mistake is reported when several processes find one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Processes may only be forked by one without threads, so not by the tests' own.
PROGRAM = """
import os, sys, time
from ringplane.compiler.bad_code import BadCode
from ringplane.compiler.side_by_side import work_off

os.sched_getaffinity = lambda process: {{0, 1}}
here = os.getpid()

def bad(message):
    raise BadCode(message)

def until(name):
    while not os.path.exists(name):
        time.sleep(0.001)

def write(name):
    open(name, "w").write(str(os.getpid() == here))

try:
    work_off({first}, {jobs})
except BadCode as error:
    print(error)
"""


def run(folder: Path, first: str, jobs: str) -> str:
    program = PROGRAM.format(first=first, jobs=jobs)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_all_jobs_are_done(tmp_path: Path) -> None:
    assert run(tmp_path, "lambda: write('a')", "[lambda: write('b'), lambda: write('c')]") == ""
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "a").read_text() == "True"


@pytest.mark.parametrize(
    ("first", "jobs", "said"),
    [
        ("lambda: bad('first')", "[lambda: bad('job')]", "first"),
        # The job has found its mistake already.
        ("lambda: [until('found'), bad('first')]", "[lambda: [write('found'), bad('job')]]", "first"),
        ("lambda: until('found')", "[lambda: [write('found'), bad('job')]]", "job"),
        # Ends a job that would not end.
        ("lambda: [until('begun'), bad('first')]", "[lambda: [write('begun'), until('never')]]", "first"),
    ],
)
def test_a_mistake_of_the_first_job_is_preferred(tmp_path: Path, first: str, jobs: str, said: str) -> None:
    assert run(tmp_path, first, jobs) == said
