"""Recordings of guests for the laboratory (`ringplane crash`): a file system or a database at work, and its check."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringplane.recordings.reader import open_recording

from .back_end_processes import BackendFactory, environment
from .kernels import program
from .machines import UmlGuest
from .workloads import Workload, script

# The file system does not use the last MiB of the disk: a guest writes marks there.
DISK, FILE_SYSTEM = 40 << 20, 39 << 20

PATHS = "PATH=$PATH:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Subject:
    """What a guest does, and how a state is checked; `planted`: it does not survive each power cut."""

    mount: str
    work: str
    check: str
    planted: bool
    programs: tuple[str, ...] = ()
    first_mark: str = "mounted"
    # Of the disk.
    options: tuple[str, ...] = ()


# Files are written, synced, renamed and removed; each mark promises the files of its round.
FILES = """\
for round in 1 2 3 4 5 6; do
    mkdir /mnt/$round
    for number in 1 2 3 4 5 6 7 8; do
        head -c $((number * 3000)) /dev/urandom > /mnt/$round/new
        mv /mnt/$round/new /mnt/$round/file$number
    done
    [ $round -lt 3 ] || rm -r /mnt/$((round - 2))
    sync
    mark $round
done
"""

EXT4 = f"{PATHS}; e2fsck -p {{image}}; e2fsck -fn {{image}}"

# A bank: each transaction moves money between two accounts, and the mark promises that it is there.
BANK = """\
sqlite() { sqlite3 /mnt/bank.db "PRAGMA synchronous=SYNCHRONOUS;" "$@"; }
sqlite "CREATE TABLE account (id INTEGER PRIMARY KEY, money INTEGER)" \\
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)
        INSERT INTO account SELECT i, 100 FROM n" \\
    "CREATE TABLE moved (id INTEGER PRIMARY KEY)" > /dev/null
sync
mark 0
for number in $(seq 1 25); do
    sqlite "BEGIN; UPDATE account SET money = money - 1 WHERE id % 25 = $number % 25; \\
        UPDATE account SET money = money + 1 WHERE id % 25 = ($number + 7) % 25; \\
        INSERT INTO moved VALUES ($number); COMMIT" > /dev/null
    mark $number
done
"""


def bank(synchronous: str) -> str:
    return BANK.replace("SYNCHRONOUS", synchronous)


# The journal of the file system is replayed, the database is copied out of it, and recovers by itself.
CONSISTENT = (
    f"set -f; {PATHS}; e2fsck -p {{image}} > /dev/null; debugfs -R 'rdump / {{folder}}' {{image}} > /dev/null 2>&1; "
    "set -- $(sqlite3 {folder}/bank.db 'PRAGMA integrity_check' 'SELECT sum(money) FROM account' "
    "'SELECT coalesce(max(id), 0) FROM moved' | tr '\\n' ' '); echo \"$@\"; "
    'test "$1" = ok && test "$2" = 20000'
)
# What was committed is there.
DURABLE = CONSISTENT + ' && test "$3" -ge {mark}'

SUBJECTS = {
    "ext4": Subject("", FILES, EXT4, planted=False),
    "ext4-barrier=0": Subject("-o barrier=0", FILES, EXT4, planted=True),
    "ext4-lying-flush": Subject("", FILES, EXT4, planted=True, options=("--policy", "lying_flush")),
    # FULL does not sync the folder when the journal is removed, so the last transaction may be rolled back; EXTRA does.
    "sqlite-FULL": Subject("", bank("FULL"), CONSISTENT, planted=False, programs=("sqlite3",), first_mark="0"),
    "sqlite-EXTRA": Subject("", bank("EXTRA"), DURABLE, planted=False, programs=("sqlite3",), first_mark="0"),
    "sqlite-OFF": Subject("", bank("OFF"), DURABLE, planted=True, programs=("sqlite3",), first_mark="0"),
}


def marking(token: str) -> str:
    """A shell function: writes a mark behind the file system."""
    return f"""\
mark() {{
    {{ printf '%s%s' '{token}' "$1"; head -c 4096 /dev/zero; }} | head -c 4096 > /tmp/mark
    dd if=/tmp/mark of=/dev/vda bs=4096 seek={FILE_SYSTEM // 4096} oflag=direct conv=notrunc 2> /tmp/dd.txt
}}
"""


def record(backend: BackendFactory, guest: UmlGuest, folder: Path, subject: Subject) -> tuple[Path, Path]:
    """Let a guest work on a file system; returns the base image and the recording."""
    base, image, recording = folder / "base.img", folder / "disk.img", folder / "disk.rec"
    mkfs = program("mkfs.ext4", "e2fsprogs")
    with base.open("wb") as file:
        file.truncate(DISK)
    size = f"{FILE_SYSTEM >> 10}k"
    subprocess.run([mkfs, "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", base, size], check=True)
    image.write_bytes(base.read_bytes())
    disk = backend(image, num_queues=1, extra=["--record", str(recording), *subject.options])
    token = open_recording(recording).header.token
    body = marking(token) + f"mount -t ext4 {subject.mount} /dev/vda /mnt\nmark mounted\n{subject.work}\n"
    guest.run(disk, Workload(script(body), subject.programs))
    disk.stop()
    return base, recording


def crash(base: Path, recording: Path, subject: Subject, *, states: int) -> dict[str, Any]:
    """What the laboratory finds."""
    command = [
        *(sys.executable, "-m", "ringplane", "crash", "--base", str(base), "--recording", str(recording)),
        *("--check", subject.check, "--states", str(states), "--seconds", "36000", "--json"),
        *("--tear", "4096", "--from-mark", subject.first_mark),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
