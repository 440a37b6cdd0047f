"""Recordings of guests for the laboratory (`ringplane crash`): a file system or a database at work, and its check."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringplane.recordings.reader import open_recording

from .back_end_processes import BackendFactory, environment
from .kernels import need, program
from .machines import UmlGuest
from .workloads import Workload, script

MIB = 1 << 20


@dataclass(frozen=True)
class FileSystem:
    """How it is made: its size in bytes, which is a multiple of 1 MiB, and the command for an image."""

    name: str
    size: int
    package: str
    options: tuple[str, ...]

    def make(self, image: Path, *more: str | Path) -> None:
        """In a new image, which has 1 MiB more than the file system uses: a guest writes marks there."""
        mkfs = program(f"mkfs.{self.name}", self.package)
        with image.open("wb") as file:
            file.truncate(self.size)
        subprocess.run([mkfs, "-q", *self.options, *more, image], check=True)
        os.truncate(image, self.size + MIB)


EXT4 = FileSystem("ext4", 39 * MIB, "e2fsprogs", ("-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"))
# mkfs.xfs makes nothing smaller than 300 MB. The sectors of the file system are the physical blocks of the disk, as
# mkfs.xfs makes them on a block device.
XFS = FileSystem("xfs", 304 * MIB, "xfsprogs", ("-s", "size=4096"))


@dataclass(frozen=True)
class Subject:
    """What a guest does, and how a state is checked; `planted`: it does not survive each power cut."""

    # A shell script, which takes about as long as there are $rounds.
    work: str
    check: str
    planted: bool
    file_system: FileSystem = EXT4
    mount: str = ""
    # Puts into a folder what is in the file system at the beginning.
    fill: Callable[[Path], None] | None = None
    programs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    first_mark: str = "mounted"
    # Of the disk.
    options: tuple[str, ...] = ()
    rounds: int = 6
    # So many are enough to find what is planted.
    states: int = 150


def script_of(subject: Subject, rounds: int, token: str) -> str:
    """What a guest does; the shell function `mark` writes a mark behind the file system."""
    system = subject.file_system
    return script(f"""\
mark() {{
    {{ printf '%s%s' '{token}' "$1"; head -c 4096 /dev/zero; }} | head -c 4096 > /tmp/mark
    dd if=/tmp/mark of=/dev/vda bs=4096 seek={system.size // 4096} oflag=direct conv=notrunc 2> /tmp/dd.txt
}}
rounds={rounds}
mount -t {system.name} {subject.mount} /dev/vda /mnt
mark mounted
{subject.work}
""")


def make_base(base: Path, subject: Subject) -> None:
    """The image on which a guest begins."""
    if subject.fill is None:
        subject.file_system.make(base)
        return
    # Databases are not run by root, and the folders of tests are root's only.
    with tempfile.TemporaryDirectory(prefix="ringplane-fill-") as name:
        subject.fill(Path(name))
        subject.file_system.make(base, "-d", name)


def record(backend: BackendFactory, guest: UmlGuest, folder: Path, subject: Subject, rounds: int) -> tuple[Path, Path]:
    """Let a guest work on a file system; returns the base image and the recording."""
    base, image, recording = folder / "base.img", folder / "disk.img", folder / "disk.rec"
    make_base(base, subject)
    copy(base, image)
    disk = backend(image, num_queues=1, extra=["--record", str(recording), *subject.options])
    token = open_recording(recording).header.token
    guest.run(disk, Workload(script_of(subject, rounds, token), subject.programs, files=subject.files))
    disk.stop()
    image.unlink()
    return base, recording


def need_mounts(image: Path) -> None:
    """A file system is checked by the kernel, which mounts it. This does not change the image."""
    mount = ["unshare", "--mount", "mount", "-t", "xfs", "-o", "ro,loop", image, "/mnt"]
    mounted = os.geteuid() == 0 and subprocess.run(mount).returncode == 0
    need(mounted or None, "xfs is mounted through a loop device: run the tests as root, where both are possible")


def copy(image: Path, other: Path) -> None:
    subprocess.run(["cp", "--sparse=always", image, other], check=True)


def crash(base: Path, recording: Path, subject: Subject, *, states: int, seconds: int, jobs: int) -> dict[str, Any]:
    """What the laboratory finds. The command is printed: with `pytest -s`, or if the test fails."""
    command = [
        *("ringplane", "crash", "--base", str(base), "--recording", str(recording), "--check", subject.check),
        *("--tear", "4096", "--from-mark", subject.first_mark, "--time-limit", "300"),
        *("--states", str(states), "--seconds", str(seconds), "--jobs", str(jobs)),
    ]
    print(shlex.join(command))
    done = subprocess.run([sys.executable, "-m", *command, "--json"], capture_output=True, text=True, env=environment())
    assert done.returncode in (0, 1), done.stdout + done.stderr
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def status_replayed(base: Path, smallest: dict[str, Any], subject: Subject) -> int:
    """The exit status of the check on a copy of the base image on which the failing state was played."""
    with tempfile.TemporaryDirectory(prefix="ringplane-replay-") as name:
        image, empty = Path(name, "disk.img"), Path(name, "empty")
        copy(base, image)
        replay = [sys.executable, "-m", "ringplane", "replay", "--fast", smallest["recording"], str(image)]
        subprocess.run(replay, check=True, env=environment())
        empty.mkdir()
        # A database, as another user, finds its files there.
        os.chmod(name, 0o755)
        values = {"{image}": image, "{folder}": empty, "{mark}": smallest["mark_before"]}
        check = subject.check
        for each, value in values.items():
            check = check.replace(each, shlex.quote(str(value)))
        # What root mounts disappears with its namespace.
        namespace = ["unshare", "--mount"] if os.geteuid() == 0 else []
        return subprocess.run([*namespace, "sh", "-c", check]).returncode
