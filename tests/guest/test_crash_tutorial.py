"""docs/crash-tutorial.md, followed literally: from a program with a bug to the power cut that shows it."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import kernels
from .back_end_processes import STAND_IN, environment
from .followed_page import FollowedPage
from .machines import UmlGuest
from .terminal import Terminal

PAGE = Path(__file__).parents[2] / "docs/crash-tutorial.md"
# With this variable the page is written again, with the output of this run.
WRITE = "RINGPLANE_WRITE_TUTORIAL"

# What `ringplane crash` prints first.
FOUND = re.compile(r"(\d+) tried \(\d+ were the same as others\), (\d+) failed")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder as in the section "Install", but that its programs are those of this test run."""
    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        programs = Path(name, "venv/bin")
        programs.mkdir(parents=True)
        script(programs / "python", f'exec {sys.executable} "$@"')
        script(programs / "ringplane", f'exec {sys.executable} -m ringplane "$@"')
        uml = kernels.uml_kernel().image
        preload = UmlGuest(tmp_path, lambda _: b"", uml).preload()
        settings = " ".join(f"{name}={value}" for name, value in preload.items())
        script(programs / "linux.uml", f'exec env {settings} {uml} "$@"')
        yield Path(name)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def page(folder: Path) -> Iterator[FollowedPage]:
    for program, package in (("e2fsck", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("insmod", "kmod")):
        kernels.program(program, package)
    path = f"{folder}/venv/bin:{os.environ.get('PATH', '')}:/usr/sbin"
    plain = {name: value for name, value in environment().items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    terminal = Terminal(folder, {**plain, "PATH": path, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"})
    terminal.run("stty rows 24 cols 80")
    try:
        yield FollowedPage(PAGE, terminal, folder)
    finally:
        terminal.close()
        if (log := folder / "serve.log").exists():
            print(f"{log}:\n{log.read_text(errors='replace')}")  # pytest shows it when the test fails


def failed(output: str) -> list[int]:
    """How many states failed, for each time that states were tried; the exit status says the same."""
    found = [int(number) for _, number in FOUND.findall(output)]
    assert [int(status) for status in re.findall(r"exit status (\d+)", output)] == [bool(number) for number in found]
    return found


@pytest.mark.timeout(600)
@pytest.mark.skipif(STAND_IN, reason="only for ringplane")
def test_the_tutorial(page: FollowedPage, folder: Path) -> None:
    page.follow("Install")
    for heading in ("A program with a bug", "A guest", "Record it"):
        page.follow(heading)
    (number,) = failed(page.follow("Try the power cuts"))
    assert number
    assert re.search(r" 0 +\S+ +\S+ order-\d", page.follow("Look at the state"))
    assert failed(page.follow("Mend it")) == [0]

    (number,) = failed(page.follow("For file-system people"))
    assert number
    number, none = failed(page.follow("For database people"))
    assert number
    assert not none
    driver = page.follow("For driver authors")
    number, none = failed(driver)
    assert number
    assert not none
    assert driver.count("all states have been tried") == 2
    page.follow("Where to look next")
    if WRITE in os.environ:
        PAGE.write_text(page.written())
