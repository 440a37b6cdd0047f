"""How `ringplane crash` runs checks: nothing of one is left when the next one runs, and what was found is kept."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_laboratory import BLOCK, PATIENCE, WHOLE, Recorded, command, result

ONE_CPU = ("taskset", "-c", str(min(os.sched_getaffinity(0))))


@pytest.fixture
def disk(tmp_path: Path) -> Recorded:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(64 * BLOCK))
    return Recorded(base, tmp_path / "disk.rec", base.stat().st_size)


def one_at_a_time(disk: Recorded, check: str, *options: str, status: int) -> subprocess.CompletedProcess[str]:
    """With one process that runs checks. The errors are one line, if any."""
    disk.save()
    arguments = [*ONE_CPU, *command(disk, check, *options)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, cwd=disk.base.parent)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr
    return done


def attached_files() -> Iterator[str]:
    """The files of all loop devices."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        # It may be detached at any moment.
        with contextlib.suppress(OSError):
            yield path.read_text().rstrip()


def test_the_content_of_each_state_is_read_back(disk: Recorded) -> None:
    """The kernel keeps what it has read of the image, and forgets what is different in the next state."""
    places = [0, 512, 5 * BLOCK + 512, 5 * BLOCK + 1024, 40 * BLOCK, 63 * BLOCK + 3584]
    for place in places:
        disk.write(place, bytes([place % 251 + 1]) * 512)
    sums = disk.base.with_name("sums")
    check = (
        f"sha256sum < {{image}} >> {sums}; printf checked | dd of={{image}} bs=1 seek=12345 conv=notrunc status=none"
    )
    assert result(disk, check, *WHOLE, status=0)["tried"] == 64
    expected = []
    for kept in itertools.product([False, True], repeat=len(places)):
        image = bytearray(disk.base.read_bytes())
        for place in itertools.compress(places, kept):
            image[place : place + 512] = bytes([place % 251 + 1]) * 512
        expected.append(f"{hashlib.sha256(image).hexdigest()}  -")
    assert sorted(sums.read_text().splitlines()) == sorted(expected)


def test_what_was_found_before_an_error_is_reported(disk: Recorded) -> None:
    for number in range(6):
        disk.write(number * BLOCK, b"x" * BLOCK)
    check = "test -s {image}; echo >> runs; test $(wc -l < runs) -lt 5 || exit 127; exit 3"
    done = one_at_a_time(disk, check, *WHOLE, status=2)
    assert "4 tried" in done.stdout
    assert "the check ended with status 3, and was not repeated" in done.stdout
    assert done.stderr == "Error: the check cannot be executed: 127\n"
    assert disk.path.with_name("disk.rec.failing").exists()
    disk.base.with_name("runs").unlink()
    found = json.loads(one_at_a_time(disk, check, "--json", *WHOLE, status=2).stdout)
    assert found["stopped"] == "the check cannot be executed: 127"
    assert (found["failed"], found["smallest"]["confirmed"]) == (4, None)


def test_where_the_state_is_recorded_is_tried_before_the_checks(disk: Recorded) -> None:
    disk.write(0, b"x" * BLOCK)
    done = one_at_a_time(disk, "touch begun {image}", "--out", "no-such-folder/x", status=2)
    assert done.stderr.startswith("Error: no-such-folder/x: cannot be written: No such file or directory")
    assert not disk.base.with_name("begun").exists()


def test_what_cannot_be_recorded_is_reported(disk: Recorded) -> None:
    disk.write(0, b"x" * BLOCK)
    disk.base.with_name("folder").mkdir()
    done = one_at_a_time(disk, "test -s {image}; rm -rf folder; exit 1", "--out", "folder/x", *WHOLE, status=1)
    assert "the smallest failing state" in done.stdout
    assert done.stderr.startswith("Error: folder/x: cannot be written")


@pytest.mark.parametrize("number", ["TERM", "HUP", "KILL"])
def test_a_signal_to_a_process_that_runs_checks_is_not_a_failed_check(disk: Recorded, number: str) -> None:
    for block in range(4):
        disk.write(block * BLOCK, b"x" * BLOCK)
    check = f"echo $$ >> pids; test $(wc -l < pids) -lt 3 || {{ kill -{number} $PPID; sleep 1000; }}; test -s {{image}}"
    done = one_at_a_time(disk, check, *WHOLE, status=2)
    assert "2 tried (0 were the same as others), 0 failed" in done.stdout
    assert done.stderr == f"Error: a process that runs checks was ended by SIG{number}\n"
    pids = disk.base.with_name("pids").read_text().split()
    assert not [pid for pid in pids if Path("/proc", pid).exists()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root attaches loop devices")
def test_loop_devices_that_a_check_leaves_are_detached(disk: Recorded) -> None:
    for block in range(3):
        disk.write(block * BLOCK, b"x" * BLOCK)
    check = (
        "PATH=$PATH:/sbin:/usr/sbin; echo {image} > path; ! grep -q checked {image} && "
        "device=$(losetup --show --find {image}) && "
        "printf checked | dd of=$device bs=1 seek=12345 conv=notrunc status=none"
    )
    done = one_at_a_time(disk, check, *WHOLE, status=0)
    assert "checks have left 8 loop devices, which were detached" in done.stdout
    assert disk.base.with_name("path").read_text().rstrip() not in attached_files()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_check_that_mounts_runs_in_the_folder_of_the_command(disk: Recorded) -> None:
    """Each gets fresh mounts, and the same working folder."""
    for block in range(3):
        disk.write(block * BLOCK, b"x" * BLOCK)
    disk.base.with_name("there").mkdir()
    check = "test -s {image} && test ! -e there/base.img && mount --bind . there && test -e there/base.img"
    assert "0 failed" in one_at_a_time(disk, check, *WHOLE, status=0).stdout


def test_a_mark_may_have_any_text(disk: Recorded) -> None:
    text = "it's {folder} $HOME {image}; exit 0"
    disk.mark(text)
    disk.write(0, b"x" * BLOCK)
    check = "test -s {image}; printf %s {mark}; exit 1"
    found = json.loads(one_at_a_time(disk, check, "--json", *WHOLE, status=1).stdout)
    assert found["smallest"]["output"] == text
    disk.mark("a\0b")
    done = one_at_a_time(disk, check, status=2)
    assert done.stderr == "Error: entry 2: the text of this mark has a NUL byte; use a check without {mark}\n"


def test_a_disk_of_no_bytes(disk: Recorded) -> None:
    disk.base.write_bytes(b"")
    disk.size = 0
    assert "1 tried" in one_at_a_time(disk, "test ! -s {image}", status=0).stdout


def test_wrong_input_is_one_line(disk: Recorded, tmp_path: Path) -> None:
    disk.write(0, b"x" * BLOCK)
    assert "does not contain {image}" in one_at_a_time(disk, "true", status=2).stderr
    assert "no mark 'there'" in one_at_a_time(disk, "true {image}", "--from-mark", "there", status=2).stderr
    assert "Syntax error" in one_at_a_time(disk, "if {image}", status=2).stderr
    disk.base.unlink()
    disk.base.mkdir()
    assert one_at_a_time(disk, "true {image}", status=2).stderr == f"Error: {disk.base}: Is a directory\n"
