"""README.md, followed literally: its blocks are pasted in order into one shell, in a fresh copy, twice."""

import os
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import kernels
from .machines import UmlGuest
from .terminal import Terminal

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()

# By default it measures for minutes, with images of 1 GiB.
BRIEFLY = " --rounds 1 --seconds 0.1 --size 64M --workload randread --depth 8"


@dataclass(frozen=True)
class Block:
    """A code block and its language."""

    language: str
    text: str

    @property
    def program(self) -> str:
        """The first word of the block."""
        return self.text.split()[0]


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)]
SET_UP, TESTS, *REST = BLOCKS


@pytest.fixture
def fresh_copy() -> Iterator[Path]:
    """A copy of the tracked files, in a folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="readme-") as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if (REPOSITORY / name).exists():
                shutil.copy2(REPOSITORY / name, copy)
        yield Path(folder)


@pytest.fixture
def terminal(fresh_copy: Path) -> Iterator[Terminal]:
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("qemu-storage-daemon", "qemu-utils")):
        kernels.program(program, package)
    kernels.program("insmod", "kmod")
    kernels.need("kvm" if group_exists("kvm") else None, "the group kvm is wanted: groupadd --system kvm")
    terminal = Terminal(fresh_copy, {**os.environ, "TERM": "dumb"})
    yield terminal
    terminal.close()


def group_exists(name: str) -> bool:
    return subprocess.run(["getent", "group", name], capture_output=True).returncode == 0


# An installation, four guests and a cold start take minutes on a few CPUs.
@pytest.mark.timeout(1800)
def test_all_commands_can_be_pasted(terminal: Terminal, fresh_copy: Path, tmp_path: Path) -> None:
    assert "verified: all" in terminal.run(SET_UP.text)
    if preload := UmlGuest(tmp_path, lambda _: b"", kernels.uml_kernel().image).preload():
        settings = " ".join(f"{name}={value}" for name, value in preload.items())
        terminal.run(f'linux.uml() {{ env {settings} linux.uml "$@"; }}')
    for _ in range(2):
        for block in REST:
            follow(terminal, block, fresh_copy)


def follow(terminal: Terminal, block: Block, folder: Path) -> None:
    if block.language == "xml":
        return
    if block.language == "python":
        (folder / "example.py").write_text(block.text)
        assert re.search(r"^\d+\.\d+\r?\n\w+ 0 \d+ \d", terminal.run(".venv/bin/python example.py"), re.MULTILINE)
    elif block.program == "qemu-system-x86_64":
        attach_qemu(terminal, block.text)
    elif block.program == "linux.uml":
        attach_uml(terminal, block.text)
    else:
        briefly = BRIEFLY if " bench " in block.text else ""
        shown = terminal.run(block.text + briefly)
        assert "check" not in block.text or "ok: 2 disks" in shown


def attach_qemu(terminal: Terminal, command: str) -> None:
    start = len(terminal.text)
    terminal.type(command + "\n")
    # Until SeaBIOS has read the first sector.
    terminal.wait_for("Booting from Hard Disk", start)
    terminal.type("\x01x")
    assert "front end attached" in terminal.finish(start)


def attach_uml(terminal: Terminal, command: str) -> None:
    start = len(terminal.text)
    terminal.type(command + "\n")
    terminal.wait_for(r"\n# ", start)
    insmod = re.search(r"`(insmod [^`]+)`", README)
    assert insmod
    terminal.type(f"{insmod[1]}\nhead -c 512 /dev/vda | wc -c\n")
    terminal.wait_for(r"\D512\r?\n", start)
    terminal.type("poweroff -f\n")
    assert "front end attached" in terminal.finish(start)


def test_set_up_is_two_commands() -> None:
    assert SET_UP.text == "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/ringplane demo"
    assert TESTS.text == (
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest -n auto"
    )


def test_the_domain_of_libvirt_fits_the_command_before_it() -> None:
    number = [block.language for block in BLOCKS].index("xml")
    domain, command = ET.fromstring(BLOCKS[number].text), BLOCKS[number - 1].text
    source = domain.find("devices/disk[@type='vhostuser']/source[@type='unix']")
    assert source is not None
    assert f"--socket-path {source.attrib['path']} " in command
    assert domain.find("memoryBacking/source[@type='memfd']") is not None
    assert domain.find("memoryBacking/access[@mode='shared']") is not None
