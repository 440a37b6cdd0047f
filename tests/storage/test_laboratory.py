"""`ringplane crash` finds what is planted, and nothing else: real file systems, checks by their own programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringplane.recordings.entries import FLUSH, WRITE, Header
from ringplane.recordings.reader import open_recording
from ringplane.recordings.writer import RecordingWriter

BLOCK = 4096
# Seconds; a machine that is busy needs some of them.
PATIENCE = 300


@dataclass
class Recorded:
    """A base image, and what is written to it, one write at a time."""

    base: Path
    path: Path
    size: int
    blocks: list[tuple[int, bytes] | str | None] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.blocks.append((offset, data))

    def flush(self) -> None:
        self.blocks.append(None)

    def mark(self, text: str) -> None:
        self.blocks.append(text)

    def save(self) -> None:
        with self.path.open("wb") as file:
            writer = RecordingWriter(file, Header(size=self.size))
            for block in self.blocks:
                if block is None:
                    writer.add(FLUSH)
                elif isinstance(block, str):
                    writer.mark(block)
                else:
                    writer.add(WRITE, offset=block[0], data=block[1])
            writer.end()


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    base = tmp_path / "base.img"
    base.write_bytes(bytes(64 * BLOCK))
    return Recorded(base, tmp_path / "disk.rec", base.stat().st_size)


def command(recorded: Recorded, check: str, *options: str) -> list[str]:
    files = ["--base", str(recorded.base), "--recording", str(recorded.path)]
    return [sys.executable, "-m", "ringplane", "crash", *files, "--check", check, *options]


def crash(recorded: Recorded, check: str, *options: str, status: int) -> subprocess.CompletedProcess[str]:
    """Run `ringplane crash`, which has to end with this status."""
    recorded.save()
    done = subprocess.run(command(recorded, check, *options), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def result(recorded: Recorded, check: str, *options: str, status: int) -> dict[str, object]:
    found: dict[str, object] = json.loads(crash(recorded, check, "--json", *options, status=status).stdout)
    return found


# A program that writes data, and then a pointer to them: if the pointer is there, the data have to be.
POINTER, DATA = 0, 8 * BLOCK
POINTED = (
    "pointer=$(head -c 4 {image}); "
    f"data=$(dd if={{image}} bs={BLOCK} skip=8 count=1 status=none | tr -d '\\0' | tail -c 4); "
    'test "$pointer" != here || test "$data" = data || { echo "a pointer to nothing"; exit 1; }'
)
WHOLE = ("--tear", "none")


def test_a_missing_flush_is_found(recorded: Recorded) -> None:
    recorded.mark("begin")
    recorded.write(2 * BLOCK, b"x" * BLOCK)
    recorded.write(DATA, b"data" * (BLOCK // 4))
    recorded.write(POINTER, b"here" * (BLOCK // 4))
    recorded.mark("written")
    recorded.write(3 * BLOCK, b"y" * BLOCK)
    found = result(recorded, POINTED, *WHOLE, status=1)
    assert found["possible"] == "16"
    assert found["tried"] == 16
    assert found["failed"] == 4
    assert found["exhausted"]
    smallest = found["smallest"]
    assert isinstance(smallest, dict)
    missing = {"entry": 2, "kind": "write", "result": 0, "offset": DATA, "length": BLOCK, "there": []}
    assert smallest["missing"] == [missing]
    assert (smallest["mark_before"], smallest["mark_after"]) == ("begin", "written")
    assert smallest["output"] == "a pointer to nothing\n"
    assert smallest["confirmed"]
    # The state as a recording: everything but the data, and nothing behind the pointer.
    entries = list(open_recording(str(smallest["recording"])))
    writes = [entry for entry in entries if entry.kind == WRITE]
    assert [entry.offset for entry in writes] == [2 * BLOCK, POINTER]
    assert [entry.text for entry in entries if entry.kind != WRITE] == ["begin", "power cut after 3 of 6 entries"]
    image = bytearray(recorded.base.read_bytes())
    for entry in writes:
        image[entry.offset : entry.offset + entry.length] = entry.data
    replayed = recorded.base.with_name("replayed.img")
    replayed.write_bytes(image)
    assert subprocess.run(POINTED.replace("{image}", str(replayed)), shell=True).returncode == 1


def test_with_the_flush_nothing_is_found(recorded: Recorded) -> None:
    recorded.write(DATA, b"data" * (BLOCK // 4))
    recorded.flush()
    recorded.write(POINTER, b"here" * (BLOCK // 4))
    found = result(recorded, POINTED, *WHOLE, status=0)
    assert (found["tried"], found["failed"], found["smallest"]) == (3, 0, None)


def test_a_torn_write_is_found(recorded: Recorded) -> None:
    """Its last sector is missing although the first one is there."""
    recorded.write(POINTER, b"here" + bytes(DATA - 4) + bytes(BLOCK - 4) + b"data")
    assert result(recorded, POINTED, *WHOLE, status=0)["failed"] == 0
    smallest = result(recorded, POINTED, "--tear", "512", "--states", "60", status=1)["smallest"]
    assert isinstance(smallest, dict)
    assert len(smallest["missing"]) == 1


def test_without_a_cache_only_what_is_in_flight_can_be_missing(recorded: Recorded) -> None:
    recorded.write(DATA, b"data" * (BLOCK // 4))
    recorded.write(POINTER, b"here" * (BLOCK // 4))
    assert result(recorded, POINTED, *WHOLE, "--without-cache", status=0)["failed"] == 0


def test_what_a_mark_promises(recorded: Recorded) -> None:
    """The check knows the last mark; nothing can be cut before the first one."""
    recorded.write(0, b"0" * BLOCK)
    recorded.flush()
    recorded.mark("0")
    recorded.write(0, b"1" * BLOCK)
    recorded.mark("1")
    check = 'test "$(head -c 1 {image})" -ge {mark}'
    found = result(recorded, check, *WHOLE, "--from-mark", "0", status=1)
    smallest = found["smallest"]
    assert isinstance(smallest, dict)
    assert smallest["mark_before"] == "1"
    assert [each["entry"] for each in smallest["missing"]] == [3]


def test_what_a_check_writes_is_seen_by_itself_only(recorded: Recorded) -> None:
    for number in range(6):
        recorded.write(number * BLOCK, bytes([number + 1]) * BLOCK)
    check = (
        "! grep -q checked {image} && printf checked | dd of={image} bs=1 seek=12345 conv=notrunc status=none "
        "&& grep -q checked {image} && cp {image} {folder} && rm -r {folder}"
    )
    found = result(recorded, check, *WHOLE, status=0)
    assert found["tried"] == 64
    assert recorded.base.read_bytes() == bytes(64 * BLOCK)


def test_more_checks_at_a_time_than_cpus(recorded: Recorded, tmp_path: Path) -> None:
    jobs = 2 * len(os.sched_getaffinity(0))
    for number in range(jobs.bit_length()):
        recorded.write(number * BLOCK, bytes([number + 1]) * BLOCK)
    # Each waits for all the others.
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    check = f"touch {waiting}/$PPID; until [ $(ls {waiting} | wc -l) = {jobs} ]; do sleep 0.05; done; test -s {{image}}"
    found = result(recorded, check, *WHOLE, "--jobs", str(jobs), "--states", str(jobs), status=0)
    assert (found["tried"], found["failed"]) == (jobs, 0)


def test_a_check_that_takes_too_long_has_failed(recorded: Recorded) -> None:
    recorded.write(0, b"x" * BLOCK)
    done = crash(recorded, "test -s {image} && sleep 1000", "--time-limit", "0.5", "--states", "1", status=1)
    assert "the check did not end in time" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_what_a_check_leaves_mounted_is_not_removed(recorded: Recorded, tmp_path: Path) -> None:
    """The folder of the check is removed, and not what was mounted there; the next check does not see it."""
    (tmp_path / "host").mkdir()
    precious = tmp_path / "host" / "precious"
    precious.write_text("still here")
    for number in range(3):
        recorded.write(number * BLOCK, b"x" * BLOCK)
    there = tmp_path / "there"
    there.mkdir()
    check = (
        f"test -s {{image}} && test ! -e {there}/precious && mount --bind {precious.parent} {there} "
        f"&& mount --bind {precious.parent} {{folder}} && test -e {{folder}}/precious"
    )
    assert result(recorded, check, *WHOLE, status=0)["failed"] == 0
    assert precious.read_text() == "still here"


def test_a_daemon_of_a_check_ends_with_it(recorded: Recorded, tmp_path: Path) -> None:
    recorded.write(0, b"x" * BLOCK)
    pids = tmp_path / "pids"
    # It is in a session of its own, and its parent has ended. That check fails which finds one of those before.
    check = (
        f"test -s {{image}} && ! kill -0 $(cat {pids}.$PPID) && "
        f"(setsid sleep 100 >/dev/null 2>&1 & echo $! | tee -a {pids} > {pids}.$PPID)"
    )
    assert result(recorded, check, *WHOLE, status=0)["failed"] == 0
    assert not [pid for pid in pids.read_text().split() if Path("/proc", pid).exists()]


def test_what_cannot_be_run(recorded: Recorded, tmp_path: Path) -> None:
    recorded.write(0, b"x" * BLOCK)
    assert "cannot be executed" in crash(recorded, "no-such-program {image}", status=2).stderr
    assert "does not contain {image}" in crash(recorded, "true", status=2).stderr
    assert "no mark 'there'" in crash(recorded, "true {image}", "--from-mark", "there", status=2).stderr
    recorded.base.write_bytes(bytes(BLOCK))
    assert "is not its base image" in crash(recorded, "true {image}", status=2).stderr
    recorded.base.unlink()
    done = crash(recorded, "true {image}", status=2)
    assert done.stderr == f"Error: {recorded.base}: No such file or directory\n"


def test_a_signal_ends_it_with_what_was_found(recorded: Recorded, tmp_path: Path) -> None:
    for number in range(20):
        recorded.write(number * BLOCK, bytes([number + 1]) * BLOCK)
    recorded.save()
    check = f"touch {tmp_path}/begun; sleep 0.01; test -s {{image}}"
    process = subprocess.Popen(command(recorded, check), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert " tried" in output
    assert "interrupted by SIGTERM" in errors


# A toy program that replaces a file in an ext4 file system: it writes a new one, and renames it.


@pytest.fixture
def file_system(tmp_path: Path) -> Recorded:
    """A file system without a journal, with a file "old"; each write is recorded when debugfs has ended."""
    base = tmp_path / "base.img"
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-b", str(BLOCK), str(base), "8M")
    change(base, tmp_path, "old content\n", "file")
    return Recorded(base, tmp_path / "disk.rec", base.stat().st_size)


def run(*arguments: str | Path) -> None:
    subprocess.run(
        arguments, check=True, capture_output=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    )


def change(image: Path, folder: Path, content: str, name: str) -> None:
    source = folder / "source"
    source.write_text(content)
    run("debugfs", "-w", "-R", f"write {source} {name}", image)


def differences(before: bytes, after: bytes) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(after), BLOCK):
        if before[start : start + BLOCK] != after[start : start + BLOCK]:
            yield start, after[start : start + BLOCK]


def replace_file(recorded: Recorded, folder: Path, *, fsync: bool) -> None:
    """Record the new file, and the rename."""
    image = folder / "work.img"
    image.write_bytes(recorded.base.read_bytes())
    before = image.read_bytes()
    recorded.mark("begin")
    change(image, folder, "new content\n", "new")
    for offset, data in differences(before, image.read_bytes()):
        recorded.write(offset, data)
    if fsync:
        recorded.flush()
    before = image.read_bytes()
    for each in ("unlink file", "ln new file", "unlink new"):
        run("debugfs", "-w", "-R", each, image)
    recorded.mark("rename")
    for offset, data in differences(before, image.read_bytes()):
        recorded.write(offset, data)


# Either file is good; ten bytes of a block that was not written are not.
TOOLS = "PATH=$PATH:/usr/sbin:/sbin;"
REPLACED = f"{TOOLS} debugfs -c -R 'cat file' {{image}} 2>&1 | grep -qx -e 'old content' -e 'new content'"


def test_a_rename_without_fsync_is_found(file_system: Recorded, tmp_path: Path) -> None:
    replace_file(file_system, tmp_path, fsync=False)
    found = result(file_system, REPLACED, *WHOLE, status=1)
    smallest = found["smallest"]
    assert isinstance(smallest, dict)
    # One missing write is enough: the content of the new file, or its inode.
    assert len(smallest["missing"]) == 1
    assert (smallest["mark_before"], smallest["confirmed"]) == ("rename", True)


def test_a_rename_after_fsync_is_not(file_system: Recorded, tmp_path: Path) -> None:
    replace_file(file_system, tmp_path, fsync=True)
    found = result(file_system, REPLACED, *WHOLE, status=0)
    assert found["exhausted"]


def test_a_check_that_repairs(file_system: Recorded, tmp_path: Path) -> None:
    """e2fsck writes to the view; what it wrote is read back, and the next state is not repaired."""
    replace_file(file_system, tmp_path, fsync=False)
    repaired = f"{TOOLS} e2fsck -fn {{image}}; was=$?; e2fsck -fy {{image}}; e2fsck -fn {{image}}"
    found = result(file_system, f"{repaired} && exit $was", *WHOLE, "--states", "30", status=1)
    # Without a journal missing writes make an inconsistent file system, and each can be repaired.
    smallest = found["smallest"]
    assert isinstance(smallest, dict)
    assert smallest["exit_status"] == 4
    assert result(file_system, repaired, *WHOLE, "--states", "30", status=0)["failed"] == 0
