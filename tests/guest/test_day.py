"""docs/operation.md, followed literally: a day of operation with `ringplane ctl`, while two guests verify data."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from program.served import needs_all

from . import day_workloads, host, kernels
from .back_end_processes import STAND_IN, environment
from .day_workloads import LARGE, MARK, MARK_AT, SMALL
from .followed_page import FollowedPage
from .machines import QemuGuest, Result, UmlGuest
from .terminal import Terminal
from .workloads import Workload

PAGE = Path(__file__).parents[2] / "docs/operation.md"
# With this variable the page is written again, with the output of this run.
WRITE = "RINGPLANE_WRITE_OPERATION"

# As long as a guest may take (machines.DEADLINE).
PATIENCE = 400.0
RATE = re.compile(r"s: (\d+) requests per second")
EVENT = re.compile(r"^[\d-]+T[\d:.]+Z (\S+ \S+)", re.MULTILINE)
# All that happens on the page, and nothing else. What happens while `ringplane ctl events` starts is not in its output.
FIRST_EVENTS = {"web added", "db added", "old added"}
EVENTS = {
    *("web attached", "db attached", "web limits-changed", "db resized", "db paused", "db resumed", "- upgraded"),
    *("old removed", "web detached", "db detached"),
}
# The limits of the page.
FIRST, RAISED, LOWERED = 100, 400, 200
# In two seconds, a tenth of a second of the limit comes in addition.
TOLERANCE = 1.15
# What was fetched before a sample and completes after it.
DEPTH = 128


class Running:
    """One of the guests, by what it has printed."""

    def __init__(self, folder: Path, future: Future[Result]) -> None:
        self.console, self.result = folder / "console-1.txt", future

    def text(self) -> str:
        if self.result.done():
            # Raises what has gone wrong.
            return self.result.result().console
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def rates(self) -> list[int]:
        """Requests per second in each observation so far."""
        return [int(rate) for rate in RATE.findall(self.text())]

    def await_rates(self, wanted: Callable[[int], bool]) -> list[int]:
        """What is observed from now on until such a rate comes."""
        # One observation is under way.
        begun = len(self.rates()) + 1
        wait_until(lambda: any(map(wanted, self.rates()[begun:])), self)
        return self.rates()[begun:]


def wait_until(condition: Callable[[], bool], guest: Running) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not in {PATIENCE:.0f} s:\n{guest.text()}"
        time.sleep(0.1)


class Day:
    """A folder with the images, sockets and logs of the page, and a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("images", "run", "bin", "guests/web", "guests/db"):
            (folder / name).mkdir(parents=True)
        program = folder / "bin/ringplane"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ringplane "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        plain = {name: value for name, value in environment().items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.environment = {**plain, "PATH": path, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        self.terminal = Terminal(folder, self.environment)
        self.terminal.run("stty rows 12 cols 116")
        self.page = FollowedPage(PAGE, self.terminal, folder)
        self.given_up = False

    def image(self, name: str) -> Path:
        return self.folder / f"images/{name}.img"

    def disk(self, name: str) -> Any:
        """What `ringplane ctl show` answers."""
        command = [self.folder / "bin/ringplane", "ctl", "--api-socket", "run/api.sock", "show", name, "--json"]
        shown = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, check=True)
        return json.loads(shown.stdout)

    def completed(self, name: str) -> int:
        counters = self.disk(name)["counters"]
        return sum(counters[kind]["requests"] for kind in ("read", "write"))

    def check_limit(self, guest: Running, limit: int) -> None:
        """The guest is held up by the limit, and neither it nor the counters know of more requests than it permits."""
        began, before = time.monotonic(), self.completed("web")
        throttled = self.disk("web")["throttled_seconds"]
        assert max(guest.await_rates(lambda rate: rate > 0)) <= limit * TOLERANCE
        wait_until(lambda: self.disk("web")["throttled_seconds"] > throttled, guest)
        done = self.completed("web") - before
        assert done <= limit * TOLERANCE * (time.monotonic() - began) + DEPTH

    def say_enough(self) -> None:
        """End the loads of the guests."""
        for name in ("web", "db"):
            with self.image(name).open("r+b") as file:
                file.seek(MARK_AT)
                file.write(MARK)

    def disk_of(self, name: str) -> "Attached":
        return Attached(self, self.folder / f"run/{name}.sock")


@dataclass
class Attached:
    """The disk of a guest, as `Guest.run` uses it."""

    day: Day
    socket: Path

    def check_alive(self) -> None:
        """A process that has ended is noticed by the next command."""
        assert not self.day.given_up


@pytest.fixture
def day() -> Iterator[Day]:
    kernels.program("e2fsck", "e2fsprogs")
    with tempfile.TemporaryDirectory(prefix="day-") as folder:
        day = Day(Path(folder))
        try:
            yield day
        finally:
            day.terminal.close()
            for file in (*day.folder.glob("*.log"), *day.folder.glob("guests/*/*.txt")):
                print(f"{file}:\n{file.read_text(errors='replace')}")  # pytest shows it when the test fails


@pytest.mark.timeout(1200)
@needs_all
@pytest.mark.skipif(STAND_IN, reason="only for ringplane")
def test_a_day_of_operation(day: Day, uml: UmlGuest, qemu: QemuGuest, tmp_path: Path) -> None:
    page = day.page
    day.image("old").write_bytes(os.urandom(16 << 20))
    old = host.sha256(day.image("old"))
    assert "Seccomp:\t2" in page.follow("Start without a disk")
    assert "cannot be opened" in page.follow("Add three disks")

    with ThreadPoolExecutor(2) as pool:

        def boot(kind: UmlGuest | QemuGuest, name: str, workload: Workload) -> Running:
            guest = replace(kind, folder=day.folder / "guests" / name)
            future = pool.submit(guest.run, day.disk_of(name), workload, deadline=2 * PATIENCE)  # type: ignore[arg-type]
            return Running(guest.folder, future)

        web, database = boot(qemu, "web", day_workloads.web_server()), boot(uml, "db", day_workloads.database())
        try:
            work(day, web, database)
        except BaseException:
            day.given_up = True
            raise
        day.say_enough()
        seen, stored = web.result.result(), database.result.result()
    wait_until(lambda: (day.folder / "events.txt").read_text().count(" detached ") == 2, web)
    events = page.follow("The end of the day")

    assert EVENTS <= set(EVENT.findall(events)) <= EVENTS | FIRST_EVENTS
    log = (day.folder / "ringplane.log").read_text()
    assert "WARNING" not in log
    assert [log.count(f"front end {word}\n") for word in ("handed over", "detached")] == [2, 2]
    assert f"the disk has {LARGE} bytes" in stored.console
    assert host.sha256(day.image("web"), 32 << 20) == seen.value("sha256")
    assert host.sha256(day.image("old")) == old
    for image in (day.image("db"), day.folder / "snapshot.img"):
        host.check_files(image, tmp_path / image.stem, "/kept", at_least=400)
    if WRITE in os.environ:
        PAGE.write_text(page.written())


def work(day: Day, web: Running, database: Running) -> None:
    page = day.page
    page.follow("Attach two guests")
    for guest in (web, database):
        wait_until(lambda guest=guest: bool(guest.rates()), guest)  # type: ignore[misc]
    assert "3 disks, 2 attached" in page.follow("Look once")
    assert "web" in page.watch("Watch", r"(?s)(2 attached, [1-9]\d+ IOPS.*){5}")

    page.follow("Limit a disk")
    day.check_limit(web, FIRST)
    assert "at limit" in page.follow("Look at a disk at its limit")

    assert f"the disk has {SMALL} bytes" in database.text()
    page.follow("Resize a disk")
    assert page.follow("Take a snapshot").endswith("exit status 0\n")

    page.follow("Raise the limit")
    web.await_rates(lambda rate: rate > FIRST * 1.5)
    page.follow("Lower the limit")
    day.check_limit(web, LOWERED)
    page.follow("What the guest saw of its limits")

    before = day.completed("web"), day.completed("db")
    page.follow("Upgrade")
    after = day.completed("web"), day.completed("db")
    assert all(new >= old for old, new in zip(before, after, strict=True))
    database.await_rates(lambda rate: rate > 0)
    day.check_limit(web, LOWERED)

    page.follow("Remove a disk")
