"""The tutorial of docs/policies.md: what stands there is typed literally, on the host and in a guest."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from unit.waiting import eventually

from .back_end_processes import STAND_IN, START_DEADLINE, Backend, environment
from .machines import UmlGuest
from .workloads import Workload, script

PAGE = (Path(__file__).resolve().parents[2] / "docs/policies.md").read_text()
SECTION = re.search(r"^## Write a policy\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
assert SECTION
BLOCKS = [
    textwrap.dedent(block).strip("\n")
    for block in re.findall(r"(?:^(?:    .*)?\n)+", SECTION[1], re.MULTILINE)
    if block.strip()
]
FILE, *SESSIONS = BLOCKS

HOST, GUEST = "$ ", "# "
# How many requests a guest makes besides is not known.
REQUESTS = re.compile(r"\brequests=\d+")


@dataclass(frozen=True)
class Step:
    """A command at the prompt of the host or of the guest, and the output that follows."""

    prompt: str
    command: str
    output: str


def steps(session: str) -> Iterator[Step]:
    for prompt, first, rest in re.findall(r"^([$#] )(.*\n?)((?:(?![$#] ).*\n?)*)", session, re.MULTILINE):
        lines = rest.splitlines(keepends=True)
        command = first
        while lines and (command.endswith("\\\n") or lines[0].startswith("> ")):
            command += lines.pop(0).removeprefix("> ")
        yield Step(prompt, command.strip(), "".join(lines).strip("\n"))


def arguments(command: str) -> list[str]:
    name, *words = shlex.split(command.replace("\\\n", " "))
    assert name == "ringplane"
    return [sys.executable, "-m", "ringplane", *words]


def type_on_host(step: Step, folder: Path) -> None:
    done = subprocess.run(
        arguments(step.command), cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert REQUESTS.sub("", done.stdout).rstrip() == REQUESTS.sub("", step.output), step.command


def serve(command: str, folder: Path) -> Backend:
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments(command), cwd=folder, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
    return Backend(process, folder / "disk.sock", log)


def listens(disk: Backend) -> bool:
    """The kernel shows the path of its socket as it was given, which is a relative one."""
    disk.check_alive()
    return "listening on disk.sock" in disk.logged()


def in_guest(guest: UmlGuest, disk: Backend, typed: list[Step]) -> None:
    """The kernel writes its messages to the same console."""
    body = "dmesg -n 1\n" + "\n".join(step.command for step in typed)
    shown = guest.run(disk, Workload(script(body))).console.replace("\r", "")
    assert "\n".join(step.output for step in typed) in shown


@pytest.mark.skipif(STAND_IN, reason="only for ringplane")
def test_the_tutorial(uml: UmlGuest) -> None:
    check, start, *more = [step for session in SESSIONS for step in steps(session)]
    with tempfile.TemporaryDirectory(prefix="policy-") as name:
        folder = Path(name)
        (folder / "faults.py").write_text(FILE + "\n")
        type_on_host(check, folder)
        disk = serve(start.command, folder)
        try:
            assert eventually(lambda: listens(disk), START_DEADLINE)
            in_guest(uml, disk, [step for step in more if step.prompt == GUEST])
            listed = [step for step in more if step.prompt == HOST]
            assert len(listed) == 1
            type_on_host(listed[0], folder)
            disk.stop()
        finally:
            disk.kill()
